"""Code of the user's that a configuration or a command names as `package.module:NAME`: networks, objectives, attacks.

A name in a file imports nothing. What the user types on a command line, or passes in Python, may be imported.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from genray.errors import ConfigError, GenrayError, one_line

_allowed: set[str] = set()
_given: dict[str, Any] = {}
_packages: dict[str, str] = {}


def is_own(name: str) -> bool:
    """Whether the name is `package.module:NAME`."""
    return ":" in name


def allow_import(*names: str):
    """Lets `find` import these, because the user, and not only a file, named them: `package.module:NAME`, or a package
    or module for all that it has."""
    _allowed.update(names)


def allow_typed(given: Any):
    """Lets `find` import every name in what the user typed or passed: overrides, a configuration, attacks."""
    allow_import(*re.findall(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", str(given)))


def name_of(defined: Any) -> str:
    """`package.module:NAME` of a function or class, for records."""
    name = getattr(defined, "__qualname__", type(defined).__qualname__)
    return f"{getattr(defined, '__module__', '__main__')}:{re.sub('[^A-Za-z0-9_.]+', '_', name).strip('._')}"


def give(defined: Any, name: str | None = None) -> str:
    """Lets `find` return this function or class for its name, or for `name`; returns the name."""
    _given[name or name_of(defined)] = defined
    return name or name_of(defined)


def named(data: Any) -> Any:
    """Plain data with the name of each function and class in it, which `find` then returns."""
    if isinstance(data, Mapping):
        return {key: named(value) for key, value in data.items()}
    return give(data) if inspect.isclass(data) or inspect.isroutine(data) else data


@contextmanager
def only_here() -> Iterator[None]:
    """Forgets at its end what was allowed and given inside."""
    before = set(_allowed), dict(_given)
    try:
        yield
    finally:
        _allowed.intersection_update(before[0])
        _given.clear()
        _given.update(before[1])


def find(name: str, field: str, cure: str = "in Python, pass the class itself in place of its name") -> Callable:
    """The function or class of a name.

    Args:
        name: `package.module:NAME`.
        field: that names it.
        cure: the way to name it in Python.

    Raises:
        ConfigError: nobody but a file named it, it cannot be imported, or it cannot be called.
    """
    if name in _given:
        found = _given[name]
        remember_package(found)
        return found
    module, _, attribute = name.partition(":")
    levels = module.split(".")
    if not _allowed & {name, *(".".join(levels[:i]) for i in range(1, len(levels) + 1))}:
        raise ConfigError(
            f"{field}: {name} is not imported because a file names it: {cure}; for a command, --allow {name}"
        )
    with errors_as(f"{field}: {module} cannot be imported"):
        found = _import(module, attribute, field)
    remember_package(found)
    return found


@contextmanager
def errors_as(problem: str, *passed: type[Exception]) -> Iterator[None]:
    """For code of the user's or of another library, which may raise anything. Errors of genray and those `passed` stay.

    Raises:
        ConfigError: `problem`, and the error in one line.
    """
    kept: tuple[type[Exception], ...] = (GenrayError, *passed)
    try:
        yield
    except kept:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{problem}: {type(error).__name__}: {one_line(error)}") from error


def call(function: Callable, offered: dict[str, Any], options: dict[str, Any]) -> Any:
    """Calls a function or class of the user's with the options, and with those of `offered` that it has parameters
    for."""
    return function(**({key: value for key, value in offered.items() if key in taken(function, offered)} | options))


def taken(function: Callable, names: Iterable[str]) -> set[str]:
    """Those of the names that a function has parameters for."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name for name in names if takes_all or name in parameters}


def remember_package(defined: Any):
    """Records the package that defines a function, class or object, so that it is sent to the nodes of a cluster."""
    name = (getattr(defined, "__module__", None) or "__main__").partition(".")[0]
    module = sys.modules.get(name)
    path = next(iter(getattr(module, "__path__", ())), getattr(module, "__file__", None))
    if name not in ("__main__", "genray", *sys.stdlib_module_names) and path and "site-packages" not in path:
        _packages[name] = path


def packages() -> list[str]:
    """Folders, or files of single modules, that `remember_package` recorded."""
    return list(_packages.values())


def _import(module_name, attribute, field):
    if module_name.partition(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names} - {"__main__"}:
        raise ConfigError(f"{field}: expected code of your own, got one of Python's own modules: {module_name!r}")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(f"{field}: expected a module that can be imported, got {module_name!r}") from None
        raise
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{field}: expected {module_name} to have {attribute}, it has not")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{field}: expected {module_name}:{attribute} to be callable, got {type(found).__name__}")
    return found
