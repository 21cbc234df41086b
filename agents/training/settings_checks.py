"""What settings must be like: checks that say which setting is wrong, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from specgym.decoding import SpecgymError


class SettingsError(SpecgymError, ValueError):
    """A setting that makes no sense or contradicts another; the message names it."""


def require_folder_name(name: str) -> None:
    """Raise SettingsError unless the name of a run is that of a folder, or empty."""
    if name in (".", "..") or any(letter in name for letter in "/\\"):
        raise SettingsError(f"name must be a plain folder name, got {name!r}; --runs says where it goes")


def require_weights(weights: Sequence[float], workloads: Sequence[str]) -> None:
    """Raise SettingsError unless there is no weight, or a positive one for every workload."""
    if weights and (len(weights) != len(workloads) or not all(math.isfinite(w) and w > 0 for w in weights)):
        raise SettingsError(f"weights must be {len(workloads)} positive numbers, one a workload, got {weights}")


def require_one_bound(bound: float | None, of_reward: float | None) -> None:
    """Raise SettingsError unless a bound on the divergence is within its range, and the reward has no other one."""
    if bound is not None and not 0 < bound <= 1:
        raise SettingsError(f"max_divergence must be above 0 and at most 1, got {bound}; for 0 use a lossless decoder")
    if of_reward not in (None, bound):
        raise SettingsError(
            f"the reward's own max_divergence is {of_reward}; give --max-divergence {of_reward} instead, which also "
            "lets the price of going beyond be learned"
        )


def require_at_least(settings: Any, least: int, *names: str) -> None:
    """Raise SettingsError unless some settings are whole numbers of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{name} must be a whole number of at least {least}, got {value!r}")


def require_within(settings: Any, low: float, high: float, *names: str) -> None:
    """Raise SettingsError unless some settings lie between two numbers."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise SettingsError(f"{name} must be between {low:g} and {high:g}, got {value}")


def require_above_zero(settings: Any, *names: str) -> None:
    """Raise SettingsError unless some settings are finite and positive."""
    for name in names:
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) > 0):
            raise SettingsError(f"{name} must be a finite number above 0, got {getattr(settings, name)}")


def require_one_of(settings: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError unless a setting is one of its choices."""
    if getattr(settings, name) not in choices:
        raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {getattr(settings, name)!r}")
