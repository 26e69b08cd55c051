"""For every test: hypothesis measures no time, as this machine's other load would decide the outcome."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
