"""Checks of what environments are given; a refusal names the argument."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError, naming the argument, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def whole_number(name: str, value: float) -> int:
    """The argument of this name; raises ValueError unless it is a whole number of at least 1."""
    if value < 1 or int(value) != value:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)
