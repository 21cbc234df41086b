"""Everything that a training run is made of: the command line's options, and what ``settings.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..decoding.errors import SpecgymError
from ..decoding.files import write_json
from ..envs.rewards import RewardSettings
from ..envs.workloads import SHIPPED_WORKLOADS
from .files import RunFileError, read_json

FORMAT = "specgym-settings-1"
_T = TypeVar("_T")


class SettingsError(SpecgymError, ValueError):
    """A setting that makes no sense or contradicts another; the message names it."""


@dataclass(frozen=True)
class EnvironmentSettings:
    """What the agent practises on."""

    draft_length: int = 16
    """Tokens drafted every round (K), and the upper end of the rollback threshold."""
    tokens_per_step: int = 32
    """Tokens generated for one prompt in one environment step."""
    backend: Literal["live", "replay"] = "live"
    """Run the models, or replay the recorded traces that ship: much faster, and a little different where the learned
    text leaves the recorded ones. The table is live in any case."""
    timing: Literal["profile", "wall"] = "profile"
    """Charge each round the time of the pair's latency profile (repeatable), or the clock's (noisy, and then all
    environments run one after another)."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "draft_length", "tokens_per_step")
        require_one_of(self, "backend", ("live", "replay"))
        require_one_of(self, "timing", ("profile", "wall"))
        if self.backend == "replay" and self.timing == "wall":
            raise SettingsError("a replay has no clock; leave out --environment.timing, or --environment.backend")


@dataclass(frozen=True)
class LearningSettings:
    """Proximal policy optimisation, as in Stable-Baselines3."""

    rollout_steps: int = 20
    """Steps of every environment between two updates; 20 is one episode."""
    batch_size: int = 80
    """Transitions in a minibatch."""
    epochs: int = 10
    """Passes over a rollout in one update."""
    learning_rate: float = 1e-3
    """Of Adam."""
    gamma: float = 0.95
    """Discount: about the 20 steps of an episode ahead."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation: 0 trusts the value network, 1 the rewards."""
    clip_range: float = 0.2
    """How far an update may move an action's probability ratio from 1."""
    entropy_coefficient: float = 0.0
    """Of the bonus for spread-out actions."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    std_low: float = 0.05
    """Smallest standard deviation of the policy, in units of the action (1 is a knob's whole step)."""
    std_high: float = 1.0
    """Largest standard deviation of the policy."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rollout_steps", "epochs")
        require_at_least(self, 2, "batch_size")
        require_within(self, 0, 1, "gamma", "gae_lambda")
        require_within(self, 0, math.inf, "entropy_coefficient")
        require_above_zero(self, "learning_rate", "clip_range", "max_grad_norm", "std_low")
        if not self.std_low < self.std_high < math.inf:
            raise SettingsError(f"std_low must be below std_high, got {self.std_low} and {self.std_high}")


@dataclass(frozen=True)
class EvaluationSettings:
    """How the result is judged, on prompts that training never sees."""

    prompts: int = 8
    """Held-out prompts of every workload, at most; they are the same for all methods."""
    tokens: int = 64
    """Tokens generated for each."""
    seeds: tuple[int, ...] = (0, 1)
    """Every prompt is decoded once for each seed."""
    during_training: int = 4
    """Short evaluations spread over training (TensorBoard: eval/mean_reward); 0 for none."""
    episode_steps: int = 5
    """Steps of an episode in those; they start from the decoder's default thresholds."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompts", "tokens", "episode_steps")
        require_at_least(self, 0, "during_training")
        if not self.seeds:
            raise SettingsError("evaluation needs at least one seed")
        if any(isinstance(seed, bool) or seed < 0 for seed in self.seeds):
            raise SettingsError(f"evaluation seeds must be at least 0, got {self.seeds}")


@dataclass(frozen=True)
class TrainSettings:
    """Learn decoding thresholds by reinforcement learning. With no option at all: on the pairs that ship."""

    workloads: tuple[str, ...] = SHIPPED_WORKLOADS
    """What to tune for: pair/prompts, or pair/prompts@temperature, for instance tiny/prose or gpt2-xl+gpt2/code@1.0."""
    total_timesteps: int = 2000
    """Environment steps over all workloads; rounded up to whole rollouts."""
    seed: int = 0
    """Fixes every random choice."""
    name: str = ""
    """Of the run; by default the date and time."""
    runs: Path = Path("runs")
    """Folder of all runs. This one goes to <runs>/<name>."""
    checkpoint_every: int = 320
    """Environment steps between two checkpoints, which --resume continues from."""
    subprocesses: bool = True
    """Step every workload in a process of its own, with one torch thread each, instead of one after another here."""
    threads: int = 1
    """Torch's threads where time is measured: for latency profiles and in the table. Models as small as those that ship
    gain little from more, and with more a busy machine slows them tenfold; 0 for torch's own choice."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    identify_workloads: bool = True
    """Show the policy which workload it tunes, so that it can learn different thresholds for each."""
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """What the agent practises on."""
    learning: LearningSettings = field(default_factory=LearningSettings)
    """How it learns."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """How the result is judged."""

    def __post_init__(self) -> None:
        if not self.workloads:
            raise SettingsError("workloads is empty; name at least one, for instance tiny/prose")
        repeated = sorted({name for name in self.workloads if self.workloads.count(name) > 1})
        if repeated:
            raise SettingsError(f"workload {repeated[0]!r} is given twice; name each once")
        require_at_least(self, 1, "total_timesteps", "checkpoint_every")
        require_at_least(self, 0, "seed", "threads")
        if self.name in (".", "..") or any(letter in self.name for letter in "/\\"):
            raise SettingsError(f"name must be a plain folder name, got {self.name!r}; --runs says where it goes")
        rollout = self.learning.rollout_steps * len(self.workloads)
        if self.learning.batch_size > rollout:
            # One workload alone should need no further option.
            object.__setattr__(self, "learning", replace(self.learning, batch_size=max(2, rollout)))
        if rollout < 2:
            raise SettingsError("a rollout must have at least 2 transitions; raise rollout_steps")

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.runs / self.name

    def save(self, path: Path, command: str) -> None:
        """Write the settings with the command that made them, atomically."""
        write_json(path, {"format": FORMAT, "command": command, "settings": to_json(self)})

    @classmethod
    def load(cls, path: Path) -> TrainSettings:
        """Read what `save` wrote.

        Raises:
            RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
        """
        return load_settings(cls, path, FORMAT, "a run", "train.py")


def load_settings(kind: type[_T], path: Path, format_name: str, about: str, command: str) -> _T:
    """Settings of some kind from the file of a run.

    Args:
        kind: the dataclass.
        path: the file.
        format_name: that it must name.
        about: whose settings it should hold, for messages.
        command: that writes such runs, for messages.

    Raises:
        RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
    """
    way_out = f"is {path.parent} the folder of a run that {command} wrote?"
    content = read_json(path, way_out)
    if content.get("format") != format_name:
        raise RunFileError(f"{path} does not hold the settings of {about} ({format_name}); {way_out}")
    try:
        return from_json(kind, content.get("settings"), "settings")
    except (SpecgymError, ValueError) as error:
        raise RunFileError(f"{path}: {error}") from error


def merged(saved: TrainSettings, given: TrainSettings) -> TrainSettings:
    """The settings with which a saved run goes on: its own, or those given if they only prolong it.

    Raises:
        SettingsError: a given setting contradicts the run's.
    """
    conflicts = sorted(
        name for name, value in flat(to_json(given)).items()
        if value != flat(to_json(saved)).get(name) and name != "total_timesteps"
    )  # fmt: skip
    if conflicts:
        name = conflicts[0]
        theirs, ours = flat(to_json(given)).get(name), flat(to_json(saved)).get(name)
        raise SettingsError(
            f"the run was started with {name} = {ours}, and cannot go on with {theirs}. Leave the option out, or start "
            "a new run without --resume; only --total-timesteps may be raised."
        )
    if given.total_timesteps < saved.total_timesteps:
        raise SettingsError(
            f"the run is planned for {saved.total_timesteps} steps; total_timesteps can only be raised, and "
            f"{given.total_timesteps} would shorten it"
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
