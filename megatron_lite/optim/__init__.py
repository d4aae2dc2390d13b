"""Update rules and their schedules: paper-sized mathematics without communication.

May import config and kernels; engines bring whatever tensors a rule needs.
Begin with rules.py, the table of optimizers; learning_rate.py needs no torch.
"""
