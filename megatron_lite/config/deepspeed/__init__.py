"""A configuration of DeepSpeed (--deepspeed_config ds.json), read as a dialect of the flags.

reading.py turns the file into values with their lines, keys.py lists what becomes of every
documented key, dialect.py lays the values beside the flags.  What is more than one key has a file:
optimizers.py, rates.py (who owns the learning rate), batches.py (train = micro x accumulation x dp).
No DeepSpeed is needed, and none is imported.
"""
