"""Checks of constructor arguments, and their names in earlier versions. A refusal names the argument."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from gymnasium.utils import EzPickle

P = ParamSpec("P")
Self = TypeVar("Self")


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError, naming the argument, unless its value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def whole_number(name: str, value: float) -> int:
    """Return the value as an integer; raises ValueError, naming the argument, unless it is whole and at least 1."""
    if value < 1 or int(value) != value:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)


def renamed(arguments: Mapping[str, Any], earlier: Mapping[str, str], stacklevel: int = 3) -> dict[str, Any]:
    """Return keyword arguments by their present names, with a DeprecationWarning for every earlier name.

    Args:
        arguments: keyword arguments.
        earlier: present names by earlier ones.
        stacklevel: of the warning.

    Raises:
        TypeError: an argument is given by both names.
    """
    result = dict(arguments)
    for old, new in earlier.items():
        if old not in result:
            continue
        if new in result:
            raise TypeError(f"{old} is an earlier name of {new}; give {new} alone")
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=stacklevel)
        result[new] = result.pop(old)
    return result


def constructor(**earlier: str) -> Callable[[Callable[Concatenate[Any, P], None]], Callable[Concatenate[Any, P], None]]:
    """Decorate an environment's `__init__`: accept earlier argument names, and keep the arguments for pickling.

    Args:
        earlier: present names by earlier ones.
    """

    def decorate(init: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(init)
        def wrapper(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
            present = renamed(kwargs, earlier)
            if isinstance(self, EzPickle):
                EzPickle.__init__(self, *args, **present)
            init(self, *args, **present)

        return wrapper

    return decorate


def reset_options(
    options: Mapping[str, Any] | None, known: Sequence[str], earlier: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the options of a reset; raises ValueError for an unknown one, with the list of those there are."""
    present = renamed(options or {}, earlier or {}, stacklevel=4)
    unknown = sorted(set(present) - set(known))
    if unknown:
        raise ValueError(f"unknown reset option {unknown[0]!r}; there are: {', '.join(known)}")
    return present


def per_workload(name: str, value: Any, workloads: Sequence[str], shared: bool = False) -> list[Any]:
    """Return an argument's value for every workload, None where there is none.

    Args:
        name: of the argument, for messages.
        value: a single value, a sequence in the order of the workloads, a mapping from their names, or None.
        workloads: their names.
        shared: whether a single value may serve all.

    Raises:
        ValueError: too many or too few values, or a value for a workload that is not there.
    """
    if value is None:
        return [None] * len(workloads)
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(workloads))
        if unknown:
            raise ValueError(f"{name}: there is no workload {unknown[0]!r}; there are: {', '.join(workloads)}")
        return [value.get(workload) for workload in workloads]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(workloads):
            raise ValueError(f"{name}: {len(value)} were given for {len(workloads)} workloads")
        return list(value)
    if len(workloads) > 1 and not shared:
        raise ValueError(f"{name}: one was given for {len(workloads)} workloads; give a mapping from their names")
    return [value] * len(workloads)
