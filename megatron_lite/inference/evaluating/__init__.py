"""What a trained model is worth: perplexity, multiple choice, word problems, and tasks of lm-eval-harness.

Imports what inference/ may.  Begin with scorer.py: every measure but generation asks it for
log probabilities.  Results are records of results.py; files of tests are read by exams.py.
"""
