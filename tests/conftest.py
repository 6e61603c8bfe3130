"""Every run of the tests tries the same examples, so that one says what the next will; none is held to a time.

`pytest --hypothesis-profile=default` tries others.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
