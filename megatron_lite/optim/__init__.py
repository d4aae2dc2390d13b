"""Update rules and their schedules: paper-sized mathematics without communication.

May import config, blueprint and kernels; engines bring whatever tensors a rule needs.
Begin with rules.py, the table of rules, and groups.py, which gives each tensor to its rule;
learning_rate.py needs no torch.
"""
