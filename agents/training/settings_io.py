"""Settings, which are dataclasses, as JSON files, and how those of a saved run may be changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from specgym.decoding import SpecgymError, write_json

from .files import RunFileError, read_json
from .settings_checks import SettingsError

_T = TypeVar("_T")


class StoredSettings:
    """What the settings of every run have, which are frozen dataclasses: a place, and a file.

    Attributes:
        name: of the run; by default the date and time.
        runs: folder of all runs.
    """

    FORMAT: ClassVar[str]
    ABOUT: ClassVar[str]
    """Whose settings they are, for messages."""
    MADE_BY: ClassVar[str]
    """The command that writes such runs, for messages."""
    name: str
    runs: Path

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.runs / self.name

    def save(self, path: Path, command: str) -> None:
        """Write the settings with the command that made them, atomically."""
        write_json(path, {"format": self.FORMAT, "command": command, "settings": to_json(self)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
        """
        way_out = f"is {path.parent} the folder of a run that {cls.MADE_BY} wrote?"
        content = read_json(path, way_out)
        if content.get("format") != cls.FORMAT:
            raise RunFileError(f"{path} does not hold the settings of {cls.ABOUT} ({cls.FORMAT}); {way_out}")
        try:
            return from_json(cls, content.get("settings"), "settings")
        except (SpecgymError, ValueError) as error:
            raise RunFileError(f"{path}: {error}") from error


def prolonged(saved: _T, given: _T) -> _T:
    """The settings with which a saved run goes on: its own, or those given if they only ask for more steps.

    Raises:
        SettingsError: a given setting contradicts the run's.
    """
    ours, theirs = flat(to_json(saved)), flat(to_json(given))
    conflicts = sorted(name for name in theirs if theirs[name] != ours.get(name) and name != "total_timesteps")
    if conflicts:
        name = conflicts[0]
        raise SettingsError(
            f"the run was started with {name} = {ours.get(name)}, and cannot go on with {theirs[name]}. Leave the "
            "option out, or start a new run without --resume; only --total-timesteps may be raised."
        )
    if theirs["total_timesteps"] < ours["total_timesteps"]:
        raise SettingsError(
            f"the run is planned for {ours['total_timesteps']} steps; total_timesteps can only be raised, and "
            f"{theirs['total_timesteps']} would shorten it"
        )
    return given


def to_json(value: Any) -> Any:
    """A setting as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in value]
    return value.as_posix() if isinstance(value, Path) else value


def from_json(kind: type[_T], value: Any, where: str) -> _T:
    """A dataclass from what `to_json` made of it; fields left out take their defaults.

    Raises:
        SettingsError: a name is unknown, or a value has the wrong type; the message says where.
    """
    decoded: _T = _decoded(kind, value, where)
    return decoded


def _decoded(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decoded_dataclass(kind, value, where)
    if origin is Literal:
        if value in parts:
            return value
    elif origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return None
        return _decoded(next(part for part in parts if part is not type(None)), value, where)
    elif origin is tuple and isinstance(value, list):
        inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(inner) == len(value):
            return tuple(_decoded(k, v, f"{where}[{n}]") for n, (k, v) in enumerate(zip(inner, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {name: _decoded(parts[1], entry, f"{where}.{name}") for name, entry in value.items()}
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise SettingsError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _decoded_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise SettingsError(f"{where} must be an object, got {value!r}")
    known = {entry.name: entry for entry in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise SettingsError(f"{where} has no {unknown[0]!r}; it has: {', '.join(known)}")
    missing = [
        name for name, entry in known.items()
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise SettingsError(f"{where} lacks {missing[0]!r}")
    types = get_type_hints(kind)
    return kind(**{name: _decoded(types[name], entry, f"{where}.{name}") for name, entry in value.items()})


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """What `to_json` made of settings, by dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found |= flat(entry, f"{prefix}.{name}" if prefix else name)
    return found
