"""Arguments of the public functions, checked by their annotations as the fields of a configuration are by theirs."""

import functools
import inspect
import os
import typing
from typing import Annotated

from genray.config.parse import WRONG, parse_value
from genray.errors import ConfigError

Count = Annotated[int, ("ge", 1)]
Natural = Annotated[int, ("ge", 0)]
Seconds = Annotated[float, ("gt", 0)]
Place = os.PathLike  # a path or URI, as text too


def checked(function=None, *, error=ConfigError, prefix=""):
    """A function whose annotated arguments are refused where they are of another type, no choice or out of range.

    Args:
        function: with annotations that `parse_value` knows; arguments without one are passed on as they are.
        error: what is raised; given one line for every wrong argument where it is a `ConfigError`, else the first.
        prefix: of the arguments' names in messages.
    """
    if function is None:
        return functools.partial(checked, error=error, prefix=prefix)
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    hints = {name: hint for name, hint in hints.items() if hint is not typing.Any}

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound, problems = signature.bind(*args, **kwargs), []
        for name, value in bound.arguments.items():
            if name in hints:
                found = parse_value(hints[name], {}, value, f"{prefix}{name}", problems)
                bound.arguments[name] = value if found is WRONG else found
        if problems:
            raise error(problems if issubclass(error, ConfigError) else problems[0])
        return function(*bound.args, **bound.kwargs)

    return call
