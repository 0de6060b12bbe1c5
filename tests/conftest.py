"""Settings for all tests."""

from hypothesis import settings

# The machine is shared and small: how long an example takes says nothing about the code.
settings.register_profile("elasticrec", deadline=None)
settings.load_profile("elasticrec")
