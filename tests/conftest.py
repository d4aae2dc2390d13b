"""Settings that all tests share."""

from hypothesis import settings

# no deadline for an example: a busy machine is no failure; the suite has time limits of its own
settings.register_profile("megatron_lite", deadline=None)
settings.load_profile("megatron_lite")
