"""An object whose pickle runs code."""

from collections.abc import Callable


class Malicious:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
