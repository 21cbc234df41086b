"""Settings for tuning the knobs of a decoder, generated from what the registry knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import tyro

from specgym.callbacks import ReplaySettings
from specgym.decoding import DecoderTraits, NoOptions, build_decoder, seed_number, traits_of
from specgym.envs import DIVERGENCE_BOUND, RewardSettings, environment_id, workload

from ..training.settings_io import (
    SettingsError,
    replaced,
    require_at_least,
    require_one_bound,
    require_one_of,
    require_several,
    require_weights,
)
from .experiment import KnobLearning, RunSettings

if TYPE_CHECKING:
    from specgym.decoding import Decoder, Pair

PRACTISING_REPLAYS, FEWEST_REPLAYS = 256, 8
"""Environments that practise on replay by default, shared out among the workloads; and for each workload, at least."""

MOST_LIVE: Final = 1024
"""Live environments at most; each may be a process of its own."""


@dataclass(frozen=True)
class EnvironmentSettings:
    """Environments that the agent practises on."""

    max_new_tokens: int = 32
    """Tokens generated for one prompt in one environment step. What pays depends on it where a decoder learns from the
    text as it grows."""
    prompts_per_step: int = 1
    """Prompts decoded in one step, all with the same knobs: more make a step slower and its reward surer. Where the
    divergence is bounded, it is that of all together."""
    backend: Literal["live", "replay"] = "live"
    """Run the models, or replay recordings: some thousand times faster, and a little different from what the models
    would do. Live learning needs small --total-timesteps, --checkpoint-every and --learning.batch-size. The table is
    live in any case."""
    recordings: Path | None = None
    """Folder of recordings that `python -m specgym.envs.record` wrote, for --environment.backend replay. Defaults to
    the recordings that ship with the package."""
    timing: Literal["profile", "wall"] = "profile"
    """Charge each round the time of the pair's latency profile (repeatable), or the clock's (noisy, and then all
    environments run one after another)."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""
    decoder_options: Annotated[Any, tyro.conf.arg(name="")] = field(default_factory=NoOptions)
    """Options of the decoder."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_new_tokens", "prompts_per_step")
        require_one_of(self, "backend", ("live", "replay"))
        require_one_of(self, "timing", ("profile", "wall"))
        if self.backend == "replay" and self.timing == "wall":
            raise SettingsError(
                "a replay has no clock; leave out --environment.timing, or give --environment.backend live"
            )
        if self.backend == "live" and self.recordings is not None:
            raise SettingsError("recordings are for --environment.backend replay; live environments run the models")


@dataclass(frozen=True)
class EvaluationSettings:
    """Judgement of the result, on prompts that training never sees."""

    prompts: int = 8
    """Held-out prompts of every workload, at most; they are the same for all methods."""
    max_new_tokens: int = 64
    """Tokens generated for each prompt, at most."""
    seeds: tuple[int, ...] = (0, 1)
    """Random seeds; every prompt is decoded once with each."""
    score_texts: bool = True
    """Compare texts with the references of their prompts, where there are any: BLEU or ROUGE, which need
    specgym[quality]."""
    during_training: int = 4
    """Short evaluations spread over training (TensorBoard: eval/mean_reward); 0 for none."""
    episode_steps: int = 5
    """Steps of an episode in those; they start from the decoder's defaults."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompts", "max_new_tokens", "episode_steps")
        require_at_least(self, 0, "during_training")
        require_several(self, seed_number, "seeds")


@dataclass(frozen=True)
class KnobSettings(RunSettings):
    """Learn the knobs of a decoder by reinforcement learning. `default_settings` gives those of any decoder."""

    EXPERIMENT = "tune-knobs"

    decoder: tyro.conf.Suppress[str] = ""
    """Registered name of the decoder."""
    environments: int = 0
    """Environments that practise side by side, shared out among the workloads; 0 for one a workload, or on replay 256
    in all, but at least 8 a workload."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0,)
    """Random seeds; one policy is learned with each, one after another, and what is recommended draws on all."""
    weights: tuple[float, ...] = ()
    """Practice of each workload, in proportion, one number each in their order; by default all alike. Without effect
    where there are only as many environments as workloads."""
    subprocesses: bool = False
    """Step every live environment in a process of its own, with one torch thread each, instead of decoding the texts of
    all in one batch here. With --environment.timing wall they run one after another in any case."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    identify_workloads: bool = True
    """Show the policy which workload it tunes, so that it can learn different knobs for each."""
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """Environments that the agent practises on."""
    learning: KnobLearning = field(default_factory=KnobLearning)
    """Learning algorithm."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Judgement of the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_several(self, seed_number, "seeds")
        if self.environments and self.environments < len(self.workloads):
            raise SettingsError(
                f"environments must be 0 or at least {len(self.workloads)}, one a workload, got {self.environments}"
            )
        require_weights(self)
        if self.learning.workload_priorities:
            raise SettingsError(
                "workload_priorities needs environments that can change their workload; it is for train.py --tuner"
            )
        if self.learning.rollout_steps * self.practising < 2:
            raise SettingsError("a rollout must have at least 2 transitions; raise rollout_steps")
        if not self.replayed and self.practising > MOST_LIVE:
            raise SettingsError(f"at most {MOST_LIVE} live environments can practise, got {self.practising}")
        reward = self.environment.reward
        if self.traits.lossless and (reward.divergence_weight or reward.max_divergence is not None):
            raise SettingsError(
                "the text of a lossless decoder is the target's own, so there is no divergence to weigh or to bound; "
                "leave out --environment.reward.divergence-weight and --environment.reward.max-divergence"
            )

    @property
    def traits(self) -> type[DecoderTraits]:
        """Traits of the decoder."""
        return traits_of(self.decoder)

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--env {environment_id(self.decoder)}"

    @property
    def stem(self) -> str:
        """Start of a run's default name."""
        return self.traits.env_name.lower()

    @property
    def knobs_together(self) -> str:
        """Name of the knobs together, in messages."""
        return f"{self.decoder} knobs"

    @property
    def replayed(self) -> bool:
        """True if it learns from recordings."""
        return self.environment.backend == "replay"

    @property
    def practising(self) -> int:
        """Number of environments that practise side by side."""
        copies = max(PRACTISING_REPLAYS // len(self.workloads), FEWEST_REPLAYS) if self.replayed else 1
        return self.environments or len(self.workloads) * copies

    @property
    def reward(self) -> RewardSettings:
        """Reward of the environments."""
        return self.environment.reward

    @property
    def bound(self) -> float | None:
        """Bound on the divergence, where one is asked for."""
        return None

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """Options of the decoder, by name."""
        return asdict(self.environment.decoder_options)

    def build(self, pair: Pair) -> Decoder:
        """The decoder that is tuned. Errors as for `build_decoder`."""
        return build_decoder(self.decoder, pair, **self.decoder_options)


@dataclass(frozen=True)
class LossyKnobSettings(KnobSettings):
    """Learn the knobs of a decoder whose text may stray from the target's, and how far it may."""

    max_divergence: float | None = DIVERGENCE_BOUND
    """Bound on the mean divergence from the target, above 0; None for none. A Lagrange multiplier per workload is
    learned during training, and what is recommended keeps the bound on the training prompts, with a margin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_bound(self, self.environment.reward.max_divergence)

    @property
    def reward(self) -> RewardSettings:
        """Reward of the environments, with the bound."""
        return replace(self.environment.reward, max_divergence=self.max_divergence)

    @property
    def bound(self) -> float | None:
        """Bound on the divergence, where one is asked for."""
        return self.max_divergence


def default_settings(decoder: str = "threshold", **changes: Any) -> KnobSettings:
    """Settings for tuning a decoder.

    All learn from recordings by default. A decoder whose text may stray is learned with three seeds, since what they
    recommend should agree. The range bonus of the reward is for decoders that name preferred ranges; for others speed
    is the reward.

    Args:
        decoder: a registered name.
        changes: settings that differ from the defaults, by name; of a dataclass in them also a mapping of what
            differs in it.

    Raises:
        SettingsError: the decoder is unknown or has no knobs, or a setting makes no sense.
    """
    try:
        traits = traits_of(decoder)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    knobs = traits.knobs_without_pair()
    if not knobs:
        raise SettingsError(f"{decoder} decoding has no knobs, so there is nothing to tune")
    reward = RewardSettings()
    if not any(knob.preferred for knob in knobs):
        reward = RewardSettings(acceptance_weight=0.0, range_weight=0.0, ranges={})
    environment = EnvironmentSettings(reward=reward, decoder_options=traits.Options())
    settings: dict[str, Any] = {"decoder": decoder, "workloads": traits.workloads, "environment": environment}
    learning = KnobLearning(batch_size=1024, epochs=5, learning_rate=1e-3, plateau_patience=8, gamma=0.9)
    # As long as the table's texts: what pays may depend on it.
    environment = replace(environment, max_new_tokens=64, backend="replay")
    settings |= {
        "total_timesteps": 300_000,
        "checkpoint_every": 20_000,
        "environment": environment,
        "learning": learning,
    }
    if not traits.lossless:
        settings["seeds"] = (0, 1, 2)
    if traits.stops_by_gain:
        # Traces of texts that stray are shorter.
        settings["environment"] = replace(environment, max_new_tokens=32, prompts_per_step=4)
        # One pass, since greedy texts are the same in every one; and there are many workloads.
        settings["evaluation"] = EvaluationSettings(max_new_tokens=48, seeds=(0,))
        settings["total_timesteps"] = 150_000
        # Steps by replay of traces cost next to nothing, so old ones need not be learned from again, and prioritised
        # replay does not help here: what is recommended is as fast with it as without (docs/thresholds.md, ablation).
        replay = ReplaySettings(updates=12, segments_per_update=51, capacity=2048, max_age=8)
        settings["learning"] = replace(learning, replay=replay)
    kind = KnobSettings if traits.lossless else LossyKnobSettings
    return replaced(kind(**settings), changes)


def check_workloads(settings: KnobSettings) -> None:
    """Raise an error unless all workloads are known and suit the decoder, as far as can be told without models.

    Raises:
        WorkloadError: a workload is not known.
        SettingsError: the decoder's rounds are those of a lossless one wherever tokens are not drawn, and no workload
            draws any.
    """
    greedy = [workload(name).sampling.greedy for name in settings.workloads]
    traits = settings.traits
    if not traits.lossless and all(greedy) and traits.cost_kind(greedy=True) != traits.cost_kind(greedy=False):
        raise SettingsError(
            f"{settings.decoder} changes sampled texts alone, and every workload is greedy, so some of its knobs would "
            "do nothing; name a workload that samples, for instance tiny-3m/prose@1.0"
        )
