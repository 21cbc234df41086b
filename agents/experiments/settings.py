"""Everything that a training run is made of: the command line's options, and what ``settings.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from specgym.callbacks import ReplaySettings
from specgym.decoding import Decoder, Pair, build_decoder, traits_of
from specgym.envs import RewardSettings, workload

from ..training.settings_checks import (
    SettingsError,
    require_above_zero,
    require_at_least,
    require_folder_name,
    require_one_of,
    require_weights,
    require_within,
)
from ..training.settings_io import StoredSettings


@dataclass(frozen=True)
class EnvironmentSettings:
    """What the agent practises on, whatever the decoder."""

    tokens_per_step: int = 32
    """Tokens generated for one prompt in one environment step."""
    backend: Literal["live", "replay"] = "live"
    """Run the models, or replay the recordings that ship: much faster, and a little different from what the models
    would do. The table is live in any case."""
    recordings: Path | None = None
    """Folder of what `python -m specgym.envs.record` wrote, for --environment.backend replay; by default the recordings
    that ship with the package."""
    timing: Literal["profile", "wall"] = "profile"
    """Charge each round the time of the pair's latency profile (repeatable), or the clock's (noisy, and then all
    environments run one after another)."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "tokens_per_step")
        require_one_of(self, "backend", ("live", "replay"))
        require_one_of(self, "timing", ("profile", "wall"))
        if self.backend == "replay" and self.timing == "wall":
            raise SettingsError(
                "a replay has no clock; leave out --environment.timing, or give --environment.backend live"
            )
        if self.backend == "live" and self.recordings is not None:
            raise SettingsError("recordings are for --environment.backend replay; live environments run the models")


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
    """Discount: 0.95 looks about 20 steps ahead, as long as an episode, and 0.9 about 10."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation: 0 trusts the value network, 1 the rewards."""
    clip_range: float = 0.2
    """How far an update may move an action's probability ratio from 1."""
    entropy_coefficient: float = 0.0
    """Of the bonus for spread-out actions."""
    entropy_end: float | None = None
    """Where the entropy coefficient goes, linearly, until the end of training; by default it stays."""
    plateau_patience: int = 0
    """Lower the learning rate when the reward has not improved for so many rollouts; 0 for never."""
    plateau_factor: float = 0.5
    """What the learning rate is multiplied by then."""
    stop_patience: int = 0
    """Stop when the reward has not improved for so many rollouts; 0 for never."""
    workload_priorities: bool = False
    """Practise more on workloads where there is more to learn (Prioritized Level Replay, arXiv 2010.03934). Needs
    environments that can change their workload: those of train.py --tuner."""
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(updates=0))
    """Prioritised replay of earlier rollouts; off while it makes no updates."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    std_low: float = 0.05
    """Smallest standard deviation of the policy, in units of the action (1 is a knob's whole step)."""
    std_high: float = 1.0
    """Largest standard deviation of the policy."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rollout_steps", "epochs")
        require_at_least(self, 2, "batch_size")
        require_at_least(self, 0, "plateau_patience", "stop_patience")
        require_within(self, 0, 1, "gamma", "gae_lambda")
        require_within(self, 0, 1e6, "entropy_coefficient")
        if self.entropy_end is not None:
            require_within(self, 0, 1e6, "entropy_end")
        if not 0 < self.plateau_factor < 1:
            raise SettingsError(f"plateau_factor must be between 0 and 1, got {self.plateau_factor}")
        require_above_zero(self, "learning_rate", "clip_range", "max_grad_norm", "std_low")
        if not self.std_low < self.std_high:
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
    """Steps of an episode in those; they start from the decoder's defaults."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompts", "tokens", "episode_steps")
        require_at_least(self, 0, "during_training")
        if not self.seeds:
            raise SettingsError("evaluation needs at least one seed")
        if any(isinstance(seed, bool) or seed < 0 for seed in self.seeds):
            raise SettingsError(f"evaluation seeds must be at least 0, got {self.seeds}")


@dataclass(frozen=True)
class TrainSettings(StoredSettings):
    """How the knobs of a decoder are learned; a subclass for each decoder says what is particular to it.

    Attributes:
        ENV: the id of the environment.
        DECODER: the usual decoder's name in the registry.
        KNOBS: what the knobs of this decoder are called, together.
        REPLAYED: environments for each workload that practise on replay where `environments` is 0.
    """

    MADE_BY = "train.py"
    ENV: ClassVar[str]
    DECODER: ClassVar[str]
    KNOBS: ClassVar[str]
    REPLAYED: ClassVar[int] = 1

    workloads: tuple[str, ...] = ()
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
    """Live: step every workload in a process of its own, with one torch thread each, instead of one after another here.
    A replay needs no process but this one."""
    threads: int = 1
    """Torch's threads where time is measured: for latency profiles and in the table. Models as small as those that ship
    gain little from more, and with more a busy machine slows them tenfold; 0 for torch's own choice."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    identify_workloads: bool = True
    """Show the policy which workload it tunes, so that it can learn different knobs for each."""
    environments: int = 0
    """How many environments practise side by side, shared out among the workloads; 0 for one each, or for as many as
    suit a replay."""
    weights: tuple[float, ...] = ()
    """How often each workload is practised, in proportion, one number each in their order; by default all alike.
    With --environments as many as workloads it makes no difference."""
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
        require_at_least(self, 0, "seed", "threads", "environments")
        require_folder_name(self.name)
        if self.environments and self.environments < len(self.workloads):
            raise SettingsError(
                f"environments must be 0 or at least {len(self.workloads)}, one a workload, got {self.environments}"
            )
        require_weights(self.weights, self.workloads)
        if self.learning.workload_priorities:
            raise SettingsError(
                "workload_priorities needs environments that can change their workload; it is for train.py --tuner"
            )
        if self.learning.rollout_steps * self.practising < 2:
            raise SettingsError("a rollout must have at least 2 transitions; raise rollout_steps")

    @property
    def replayed(self) -> bool:
        """Whether it learns from recordings."""
        return self.environment.backend == "replay"

    @property
    def practising(self) -> int:
        """How many environments practise side by side."""
        return self.environments or len(self.workloads) * (self.REPLAYED if self.replayed else 1)

    @property
    def reward(self) -> RewardSettings:
        """Of the environments."""
        return self.environment.reward

    @property
    def max_divergence(self) -> float | None:
        """A bound on the divergence, where a decoder that strays from the target has one."""
        return None

    @property
    def decoder_name(self) -> str:
        """Of the decoder that is tuned, in the registry."""
        return self.DECODER

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """What an environment is told about the decoder beside its name."""
        return {}

    def decoder(self, pair: Pair) -> Decoder:
        """The decoder that is tuned. Errors as for `build_decoder`."""
        options = {"max_draft_length": self.decoder_options.get("max_draft_length", 16)}
        return build_decoder(self.decoder_name, pair, **traits_of(self.decoder_name).accepted_options(**options))

    def check_workloads(self) -> None:
        """Raise an error unless all workloads are known and suit the decoder, as far as can be told without models.

        Raises:
            WorkloadError: one is not known.
            SettingsError: there would be nothing to learn of them.
        """
        for name in self.workloads:
            workload(name)
