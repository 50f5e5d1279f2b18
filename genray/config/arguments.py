"""Arguments of the public functions, checked by their annotations as the fields of a configuration are by theirs."""

import functools
import inspect
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, create_model

from genray.config.model import AsInt, Section, collect
from genray.config.values import Real
from genray.errors import ConfigError, GenrayError

F = TypeVar("F", bound=Callable[..., Any])


def _read_path(raw: Any) -> Any:
    if hasattr(raw, "uri"):  # a `Storage`, which this layer does not import
        return raw
    if not isinstance(raw, (str, os.PathLike)) or not os.fspath(raw):
        raise ValueError
    return raw


Count = Annotated[int, Field(ge=1), AsInt]
Natural = Annotated[int, Field(ge=0), AsInt]
Seconds = Annotated[Real, Field(gt=0)]
Place = Annotated[str | os.PathLike[str], PlainValidator(_read_path), WithJsonSchema({"$comment": "a path or URI"})]


class _Arguments(Section):
    model_config = ConfigDict(arbitrary_types_allowed=True)


@typing.overload
def checked(function: F) -> F: ...
@typing.overload
def checked(*, error: type[GenrayError] = ..., prefix: str = ...) -> Callable[[F], F]: ...
def checked(function: Any = None, *, error: type[GenrayError] = ConfigError, prefix: str = "") -> Any:
    """Returns the function with a check of its annotated arguments: their types, choices and ranges.

    Args:
        function: with annotations of pydantic's kinds; arguments without one, or of type `Any`, are passed on as they
            are, and so are annotated ones of other classes after an `isinstance`.
        error: what is raised; given one line for every wrong argument where it is a `ConfigError`, else the first.
        prefix: of the arguments' names in messages.
    """
    if function is None:
        return functools.partial(checked, error=error, prefix=prefix)
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {name: (hints[name], None) for name in signature.parameters if hints.get(name, Any) != Any}
    model = create_model(function.__name__, __base__=_Arguments, **fields)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        value, problems = collect(model, {name: bound.arguments[name] for name in fields if name in bound.arguments})
        if problems:
            problems = [f"{prefix}{problem}" for problem in problems]
            raise error(problems if issubclass(error, ConfigError) else problems[0])
        bound.arguments.update((name, getattr(value, name)) for name in fields if name in bound.arguments)
        return function(*bound.args, **bound.kwargs)

    plain = typing.get_type_hints(function)  # for `help`, without what the checks need
    parameters = [p.replace(annotation=plain.get(name, p.annotation)) for name, p in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def check_again(resume: bool, overwrite: bool) -> None:
    """Refuses `resume` together with `overwrite`.

    Raises:
        ConfigError: both are asked for.
    """
    if resume and overwrite:
        raise ConfigError("--overwrite: expected no --resume with it: one begins anew, the other goes on")
