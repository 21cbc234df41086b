"""Settings for learning to tune workloads never seen, with any decoder that replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import tyro

from specgym.decoding import DecoderTraits, NoOptions, check_fields, seed_number, traits_of
from specgym.envs import DIVERGENCE_BOUND, RewardSettings, environment_id, practised_workloads, recording_name

from ..training.settings_io import SettingsError, require_at_least, require_one_bound, require_weights
from .experiment import MOST_ENVIRONMENTS, KnobLearning, RunSettings

MOST_MEASUREMENTS: Final = 10_000
"""Settings tried on a workload at most; decoders have no more that differ by much."""


def _tuner_learning() -> KnobLearning:
    return KnobLearning(
        rollout_steps=18,
        batch_size=1024,
        epochs=3,
        learning_rate=1e-3,
        plateau_patience=5,
        gamma=0.5,
        gae_lambda=0.9,
        std_low=0.03,
    )


@dataclass(frozen=True)
class TunerSettings(RunSettings):
    """Learn to tune a decoder on recorded workloads, so that a few measurements suffice on one never seen.

    Then tune pairs never seen: python evaluate.py <run> --pair <target>+<draft>.
    """

    EXPERIMENT = "tune-unseen"

    decoder: tyro.conf.Suppress[str] = ""
    """Registered name of the decoder."""
    workloads: tuple[str, ...] = ()
    """Workloads to practise on: pair/prompts, or pair/prompts@temperature. Each needs a recording of its training
    prompts and of its test prompts."""
    weights: tuple[float, ...] = ()
    """Practice of each workload, in proportion, one number each in their order; by default all alike."""
    recordings: Path | None = None
    """Folder of recordings that `python -m specgym.envs.record` wrote. Defaults to those that ship with the package."""
    total_timesteps: int = 300_000
    """Measurements over all environments; rounded up to whole rollouts."""
    environments: int = 360
    """Environments that practise side by side, shared out among the workloads."""
    measurements: int = 8
    """Settings tried on a workload before one is recommended; the policy sees what they gave."""
    prompts_per_measurement: int = 4
    """Training prompts that a measurement decodes."""
    max_new_tokens: int = 32
    """Tokens generated for each prompt."""
    decoder_options: Annotated[Any, tyro.conf.arg(name="")] = field(default_factory=NoOptions)
    """Options of the decoder."""
    seed: int = 0
    """Random seed of everything that is drawn."""
    checkpoint_every: int = 50_000
    """Measurements between two checkpoints, which --resume continues from."""
    max_divergence: float | None = None
    """Bound on the mean divergence from the target, above 0: ask for the fastest setting under it; None for the
    reward's weights and ranges, without a bound. A Lagrange multiplier per workload is learned during training."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""
    learning: KnobLearning = field(default_factory=_tuner_learning)
    """Learning algorithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "measurements", most=MOST_MEASUREMENTS)
        require_at_least(self, 1, "prompts_per_measurement", "max_new_tokens")
        check_fields(self, partial(seed_number, error=SettingsError), "seed")
        require_at_least(self, len(self.workloads), "environments", most=MOST_ENVIRONMENTS)
        require_weights(self)
        require_one_bound(self, self.reward.max_divergence)
        if self.traits.lossless and (self.reward.divergence_weight or self.max_divergence is not None):
            raise SettingsError(
                "the text of a lossless decoder is the target's own, so there is no divergence to weigh or to bound; "
                "leave out --reward.divergence-weight and --max-divergence"
            )

    @property
    def bounded_reward(self) -> RewardSettings:
        """Reward of the environments, with the bound."""
        return replace(self.reward, max_divergence=self.max_divergence)

    @property
    def traits(self) -> type[DecoderTraits]:
        """Description of the decoder without its models."""
        return traits_of(self.decoder)

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the decoder, by name."""
        return asdict(self.decoder_options)

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--tuner --env {environment_id(self.decoder)}"

    @property
    def stem(self) -> str:
        """Beginning of a run's default name."""
        return "tuner"

    def recording(self, workload: str, split: str) -> Path | None:
        """The file that a workload's prompts of a split are replayed from; None for the one that ships."""
        if self.recordings is None:
            return None
        return self.recordings / recording_name(workload, self.decoder, split)


def tuner_settings(decoder: str = "threshold", **changes: Any) -> TunerSettings:
    """Settings for learning to tune a decoder, by default on what `practised_workloads` returns.

    The range bonus of the reward is for decoders that name preferred ranges; for others speed is the reward.

    Args:
        decoder: a registered name.
        changes: settings that differ from the defaults, by name.

    Raises:
        SettingsError: the decoder is unknown, no recording of it ships and no workload is named, or a setting makes no
            sense.
    """
    try:
        traits = traits_of(decoder)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    settings: dict[str, Any] = {
        "decoder": decoder,
        "workloads": practised_workloads(decoder) or traits.workloads,
        "decoder_options": traits.Options(),
    }
    if not traits.lossless:
        settings["max_divergence"] = DIVERGENCE_BOUND
    if not any(knob.preferred for knob in traits.knobs_without_pair()):
        settings["reward"] = RewardSettings(acceptance_weight=0.0, range_weight=0.0, ranges={})
    return TunerSettings(**{**settings, **changes})
