"""Settings, which are dataclasses: as JSON, checked, and as a saved run may change them.

Readers of files that earlier versions wrote: settings and tables, as this version would have written them.

This is the only place that knows their formats, and the decoders of that time by name.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from specgym.decoding import (
    LARGEST_WHOLE,
    SpecgymError,
    check_fields,
    number,
    one_of,
    sequence_of,
    whole_number,
)

_T = TypeVar("_T")
Number = NewType("Number", float)
"""A finite number as JSON has it, whole where it is written so; for `decoded`."""
_LARGEST = 2.0**63


class SettingsError(SpecgymError, ValueError):
    """A setting that makes no sense or contradicts another; the message names it."""


def to_json(value: Any) -> Any:
    """A setting as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in value]
    return value.as_posix() if isinstance(value, Path) else value


def from_json(default: _T, value: Any, where: str) -> _T:
    """A dataclass from what `to_json` made of it.

    Args:
        default: an instance with the values of fields left out. A field that holds a dataclass is read as that class,
            which may be narrower than the annotation.
        value: plain JSON values.
        where: what to call it in messages.

    Raises:
        SettingsError: a name is unknown, or a value has the wrong type; the message says where.
    """
    if not isinstance(value, dict):
        raise SettingsError(f"{where} must be an object, got {value!r}")
    kind: Any = type(default)
    names = [entry.name for entry in fields(kind)]
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise SettingsError(f"{where} has no {unknown[0]!r}; it has: {', '.join(names)}")
    types, read = get_type_hints(kind), {}
    for name in names:
        before = getattr(default, name)
        if name not in value:
            read[name] = before
        elif is_dataclass(before) and not isinstance(before, type):
            read[name] = from_json(before, value[name], f"{where}.{name}")
        else:
            read[name] = decoded(types[name], value[name], f"{where}.{name}")
    settings: _T = kind(**read)
    return settings


def decoded(kind: Any, value: Any, where: str) -> Any:
    """A value of some type from what `to_json` made of it.

    Args:
        kind: a type or an annotation: a plain type, a literal, a tuple, a mapping, a union.
        value: plain JSON values.
        where: what to call it in messages.

    Raises:
        SettingsError: the value has another type; the message says where.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in parts:
            return value
    elif origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return None
        return decoded(next(part for part in parts if part is not type(None)), value, where)
    elif origin is tuple and isinstance(value, list):
        inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(inner) == len(value):
            return tuple(decoded(k, v, f"{where}[{n}]") for n, (k, v) in enumerate(zip(inner, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {name: decoded(parts[1], entry, f"{where}.{name}") for name, entry in value.items()}
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif kind is Number and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < _LARGEST:  # also where it is no number
            return value
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise SettingsError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}")


def replaced(settings: _T, changes: Mapping[str, Any]) -> _T:
    """Settings with some changes by name; a mapping changes a dataclass in them in the same way."""
    values = {
        name: replaced(getattr(settings, name), value)
        if isinstance(value, Mapping) and is_dataclass(getattr(settings, name))
        else value
        for name, value in changes.items()
    }
    changed: Any = settings
    return replace(changed, **values)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects of `to_json` in one level, by dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    entries: dict[str, Any] = {}
    for name, entry in value.items():
        entries |= flat(entry, f"{prefix}.{name}" if prefix else name)
    return entries


def prolonged(saved: _T, asked: _T) -> _T:
    """The settings with which a saved run goes on: its own, or those asked for if they only ask for more.

    Raises:
        SettingsError: something else than `total_timesteps` or `seeds` differs, or would become less.
    """
    ours, theirs = flat(to_json(saved)), flat(to_json(asked))
    conflicts = sorted(name for name in theirs if theirs[name] != ours.get(name))
    for name in conflicts:
        if name == "total_timesteps":
            if theirs[name] < ours[name]:
                raise SettingsError(
                    f"the run is planned for {ours[name]} steps; total_timesteps can only be raised, and "
                    f"{theirs[name]} would shorten it"
                )
        elif name == "seeds":
            if not set(ours[name]) <= set(theirs[name]):
                raise SettingsError(f"the run has the seeds {ours[name]}; seeds can only be added, got {theirs[name]}")
        else:
            more = "--total-timesteps may be raised" + (" and --seeds added" if "seeds" in ours else "")
            raise SettingsError(
                f"the run was started with {name} = {ours.get(name)}, and cannot go on with {theirs[name]}. Leave the "
                f"option out, or start a new run without --resume; only {more}."
            )
    return asked


LONGEST_NAME: Final = 200
"""Bytes of a run's name at most; file systems take 255, and other files are named after it."""


def require_folder_name(name: str) -> None:
    """Raise SettingsError unless the name of a run is that of a folder, or empty."""
    if not isinstance(name, str) or name in (".", "..") or not name.isprintable() or any(c in name for c in "/\\"):
        raise SettingsError(f"name must be a plain folder name, got {name!r}; --runs says where it goes")
    if (length := len(os.fsencode(name))) > LONGEST_NAME:
        raise SettingsError(f"name must have at most {LONGEST_NAME} bytes, and has {length}; give a shorter --name")


def require_several(settings: Any, check: Callable[..., Any], *names: str) -> None:
    """Raise SettingsError unless some settings have one value or more, none of them twice, that pass a check.

    Args:
        settings: a dataclass.
        check: such as `text` or `seed_number`, which takes the class of the error.
        names: of the settings.
    """
    checked = partial(check, error=SettingsError)
    several = partial(sequence_of, check=checked, distinct=True, error=SettingsError)
    check_fields(settings, several, *names)


def require_weights(settings: Any) -> None:
    """Raise SettingsError unless `weights` has nothing, or a positive number for every one of `workloads`."""
    positive = partial(number, above=0, error=SettingsError)
    check_fields(settings, partial(sequence_of, check=positive, fewest=0, error=SettingsError), "weights")
    if settings.weights and len(settings.weights) != len(settings.workloads):
        raise SettingsError(
            f"weights must be {len(settings.workloads)} positive numbers, one a workload, got {settings.weights}"
        )


def require_one_bound(settings: Any, of_reward: float | None) -> None:
    """Raise SettingsError unless `max_divergence` is None or within its range, and the reward has no other bound."""
    if settings.max_divergence is not None:
        hint = "for 0 use a lossless decoder"
        bounded = partial(number, above=0, at_most=1, hint=hint, error=SettingsError)
        check_fields(settings, bounded, "max_divergence")
    if of_reward not in (None, settings.max_divergence):
        raise SettingsError(
            f"the reward's own max_divergence is {of_reward}; give --max-divergence {of_reward} instead, which also "
            "lets the price of going beyond be learned"
        )


def require_at_least(settings: Any, least: int, *names: str, most: int = LARGEST_WHOLE) -> None:
    """Raise SettingsError unless some settings are whole numbers from `least` to `most`."""
    check_fields(settings, partial(whole_number, at_least=least, at_most=most, error=SettingsError), *names)


def require_within(settings: Any, low: float, high: float, *names: str) -> None:
    """Raise SettingsError unless some settings lie between two numbers."""
    check_fields(settings, partial(number, at_least=low, at_most=high, error=SettingsError), *names)


def require_above_zero(settings: Any, *names: str, most: float = math.inf) -> None:
    """Raise SettingsError unless some settings are finite and positive, and at most `most`."""
    check_fields(settings, partial(number, above=0, at_most=most, error=SettingsError), *names)


def require_one_of(settings: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError unless a setting is one of its choices."""
    one_of(name, getattr(settings, name), choices, SettingsError)


SETTINGS_FORMAT = "specgym-settings-4"
_UNSEALED = "specgym-settings-3"  # has no checksum
_EARLIER, _EARLIER_REPLAYS = "specgym-settings-2", 32  # replays of every workload by default
TABLE_FORMAT = "specgym-table-2"
_UNSEALED_TABLE = "specgym-table-1"  # has no checksum
_DECODERS = {
    "specgym-settings-1": "threshold",
    "specgym-lookahead-settings-1": "lookahead",
    "specgym-medusa-settings-1": "medusa",
    "specgym-draft-tree-settings-1": "draft-tree",
}
_STOPPING, _TUNER = "specgym-stopping-settings-1", "specgym-tuner-settings-1"
_STOPPING_TABLE, _STOPPING_LIVE = "specgym-stopping-table-1", "specgym-stopping-live-1"


def current_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``settings.json``, whose `experiment` and `settings` are those of this version.

    Raises:
        ValueError: the content is of an unknown format.
    """
    current = _of_this_form(content)
    settings = current.get("settings")
    return {**current, "settings": _with_stop(settings)} if isinstance(settings, dict) else current


def _with_stop(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings from when exact decoding had a single knob: drafts that never end before their length."""
    if settings.get("decoder") != "speculative":
        return settings
    environment = settings.get("environment")
    if isinstance(environment, dict):
        return {**settings, "environment": _never_stopping(environment)}
    return _never_stopping(settings)


def _never_stopping(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    options = holder.get("decoder_options")
    if not isinstance(options, dict):
        return holder
    return {**holder, "decoder_options": {"stop": "never", **options}}


def _of_this_form(content: Mapping[str, Any]) -> dict[str, Any]:
    known = content.get("format")
    if known in (SETTINGS_FORMAT, _UNSEALED):
        return {**content, "format": SETTINGS_FORMAT}
    settings = content.get("settings")
    if known == _EARLIER and isinstance(settings, dict):
        return {
            **content,
            "format": SETTINGS_FORMAT,
            "settings": _of_one_seed(str(content.get("experiment")), settings),
        }
    if known not in (*_DECODERS, _STOPPING, _TUNER):
        raise ValueError(f"its format is {known!r}, not {SETTINGS_FORMAT!r}")
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be an object, got {settings!r}")
    settings = dict(settings)
    if known in _DECODERS:
        experiment, settings = "tune-knobs", _knob_settings(_DECODERS[known], settings)
    elif known == _TUNER:
        experiment = "tune-unseen"
        settings["decoder"] = "threshold"
        _rename(settings, tokens_per_prompt="max_new_tokens", traces="recordings")
        if "draft_length" in settings:
            settings["decoder_options"] = {"max_draft_length": settings.pop("draft_length")}
    else:
        experiment = "stop-drafts"
        _rename(settings, tokens="max_new_tokens", traces="recordings")
    settings = _of_one_seed(experiment, settings)
    return {**content, "format": SETTINGS_FORMAT, "experiment": experiment, "settings": settings}


def _of_one_seed(experiment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from when knobs were learned with one seed, and drafts had always all their tokens.

    There was no bound unless one was asked for, and with one neither acceptance nor range counted.
    """
    settings = dict(settings)
    if experiment == "tune-knobs":
        settings["seeds"] = [settings.pop("seed", 0)]
        environment = settings["environment"] = {"prompts_per_step": 1, **settings.get("environment", {})}
        if _may_stray(settings):
            settings.setdefault("max_divergence", None)
        if environment.get("backend") == "replay" and not settings.get("environments"):
            settings["environments"] = _EARLIER_REPLAYS * len(settings.get("workloads", ()))
    else:
        environment = settings
    if settings.get("max_divergence") is not None:
        environment["reward"] = {**environment.get("reward", {}), "acceptance_weight": 0.0, "range_weight": 0.0}
    if _may_stray(settings) and settings.get("decoder") == "threshold":
        environment["decoder_options"] = {"stop": "never", **environment.get("decoder_options", {})}
    return settings


def _may_stray(settings: Mapping[str, Any]) -> bool:
    return settings.get("decoder") in ("threshold", "medusa-typical")


def _knob_settings(decoder: str, settings: dict[str, Any]) -> dict[str, Any]:
    environment = dict(settings.get("environment", {}))
    _rename(environment, tokens_per_step="max_new_tokens")
    if "draft_length" in environment:
        environment["decoder_options"] = {"max_draft_length": environment.pop("draft_length")}
    if decoder == "threshold" and environment.get("backend") == "replay" and not settings.get("environments"):
        settings["environments"] = len(settings.get("workloads", ()))  # replays were one a workload
    evaluation = dict(settings.get("evaluation", {}))
    _rename(evaluation, tokens="max_new_tokens")
    if settings.pop("acceptance", "exact") == "typical":
        decoder = "medusa-typical"
    elif decoder == "medusa":
        settings.pop("max_divergence", None)
    return {**settings, "decoder": decoder, "environment": environment, "evaluation": evaluation}


def current_table(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a ``table.json`` or ``live.json`` with rows of this version.

    Raises:
        ValueError: the content is of an unknown format.
    """
    known, rows = content.get("format"), content.get("rows")
    if known not in (TABLE_FORMAT, _UNSEALED_TABLE, _STOPPING_TABLE, _STOPPING_LIVE) or not isinstance(rows, list):
        raise ValueError(f"its format is {known!r}, not {TABLE_FORMAT!r}")
    if known in (TABLE_FORMAT, _UNSEALED_TABLE):
        return {**content, "format": TABLE_FORMAT, "rows": [_renamed_row(row) for row in rows]}
    try:
        several = len({row["batch_size"] for row in rows if row.get("batch_size")}) > 1
        current = [_renamed_row(_stopping_row(dict(row), several)) for row in rows]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from error
    return {"hardware": {}, "protocol": {}, "command": "", **content, "format": TABLE_FORMAT, "rows": current}


def _renamed_row(row: Any) -> Any:
    """A row under the present name of its method; what is no row is left for the reader to refuse."""
    earlier = isinstance(row, dict) and row.get("method") == "autoregressive"
    return {**row, "method": "plain"} if earlier else row


def _stopping_row(row: dict[str, Any], several: bool) -> dict[str, Any]:
    batch_size = row.pop("batch_size", 0)
    if row["workload"] == "all":
        row["workload"] = "all workloads"
    elif several:
        row["workload"] = f"{row['workload']} x {batch_size}"
    return {"knobs": {}, "intervals": {}, **row}


def _rename(settings: dict[str, Any], **names: str) -> None:
    for before, now in names.items():
        if before in settings:
            settings[now] = settings.pop(before)
