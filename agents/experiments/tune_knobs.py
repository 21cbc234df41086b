"""What can be tuned: for every decoder the settings of its training, which differ from another's in little.

A further decoder is one more subclass of `TrainSettings` here, and its place in `TUNABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from specgym.envs import SHIPPED_WORKLOADS, RewardSettings, workload

from ..training.files import RunFileError, read_json
from ..training.settings_checks import SettingsError, require_at_least, require_one_bound, require_one_of
from .settings import EnvironmentSettings, LearningSettings, TrainSettings


@dataclass(frozen=True)
class BoundedSettings(TrainSettings):
    """How the knobs of a decoder are learned whose text may stray from the target's, and how far it may."""

    max_divergence: float | None = None
    """Ask for the fastest setting whose mean divergence from the target stays under this bound, above 0, instead of the
    reward's weights and ranges. The price of going beyond is learned along, one for each workload."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_bound(self.max_divergence, self.environment.reward.max_divergence)

    @property
    def reward(self) -> RewardSettings:
        """Of the environments, with the bound."""
        return replace(self.environment.reward, max_divergence=self.max_divergence)


@dataclass(frozen=True)
class ThresholdEnvironment(EnvironmentSettings):
    """What the agent practises on."""

    draft_length: int = 16
    """Tokens drafted every round (K), and the upper end of the rollback threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "draft_length")


@dataclass(frozen=True)
class ThresholdSettings(BoundedSettings):
    """Learn decoding thresholds by reinforcement learning. With no option at all: on the pairs that ship."""

    FORMAT = "specgym-settings-1"
    ABOUT = "a run of thresholds"
    ENV = "specgym/Thresholds-v0"
    DECODER = "threshold"
    KNOBS = "thresholds"

    workloads: tuple[str, ...] = SHIPPED_WORKLOADS
    """What to tune for: pair/prompts, or pair/prompts@temperature, for instance tiny/prose or gpt2-xl+gpt2/code@1.0."""
    environment: ThresholdEnvironment = field(default_factory=ThresholdEnvironment)
    """What the agent practises on."""

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """The draft length."""
        return {"max_draft_length": self.environment.draft_length}


def _speed_alone() -> RewardSettings:
    return RewardSettings(acceptance_weight=0.0, range_weight=0.0, ranges={})


@dataclass(frozen=True)
class ReplayedEnvironment(EnvironmentSettings):
    """What the agent practises on, with a decoder that is replayed by its outcomes. Where its text is the target's own,
    speed is all there is to gain."""

    tokens_per_step: int = 64
    """Tokens generated for one prompt in one environment step: as many as the table's. What pays depends on it where a
    decoder learns from the text as it grows, as Lookahead's pool does."""
    backend: Literal["live", "replay"] = "replay"
    """Replay the recordings that ship, or run the models: some thousand times slower, so that --total-timesteps,
    --checkpoint-every and --learning.batch-size should be small, and free of the recordings' small errors. The table is
    live in any case."""
    reward: RewardSettings = field(default_factory=_speed_alone)
    """Weights and ranges of the reward's terms; by default the speedup is the reward. What is not accepted costs what
    the latency profile charges for it."""


def _replay_learning() -> LearningSettings:
    return LearningSettings(batch_size=1024, epochs=5, learning_rate=1e-3, plateau_patience=8, gamma=0.9)


@dataclass(frozen=True)
class ReplayedSettings(TrainSettings):
    """How the knobs of a decoder are learned that is replayed by its outcomes.

    Attributes:
        STRAYING: how else to ask for a decoder whose text strays from the target's, if there is one.
    """

    REPLAYED = 32
    STRAYING: ClassVar[str] = ""

    total_timesteps: int = 300_000
    """Environment steps over all workloads; rounded up to whole rollouts."""
    checkpoint_every: int = 20_000
    """Environment steps between two checkpoints, which --resume continues from."""
    environment: ReplayedEnvironment = field(default_factory=ReplayedEnvironment)
    """What the agent practises on."""
    learning: LearningSettings = field(default_factory=_replay_learning)
    """How it learns."""

    def __post_init__(self) -> None:
        reward = self.environment.reward
        bounded = self.max_divergence is not None or reward.max_divergence is not None
        if self.lossless and (bounded or reward.divergence_weight):
            raise SettingsError(
                "the text of a lossless decoder is the target's own, so there is no divergence to weigh or to bound; "
                f"leave out max-divergence and --environment.reward.divergence-weight{self.STRAYING}"
            )
        super().__post_init__()

    @property
    def lossless(self) -> bool:
        """Whether the text is the target's own."""
        return True


@dataclass(frozen=True)
class LookaheadSettings(ReplayedSettings):
    """Learn window, n-gram size and guesses of Lookahead decoding. With no option at all: from recordings that ship."""

    FORMAT = "specgym-lookahead-settings-1"
    ABOUT = "a run of Lookahead decoding"
    ENV = "specgym/Lookahead-v0"
    DECODER = "lookahead"
    KNOBS = "Lookahead knobs"

    workloads: tuple[str, ...] = (
        "tiny-10m/prose",
        "tiny-10m/code",
        "tiny-10m/definitions",
        "tiny-3m/prose",
        "tiny-3m/code",
        "tiny-3m/chat",
        "tiny-3m/prose@1.0",
    )
    """What to tune for: target/prompts, or target/prompts@temperature; no draft is needed. Each needs a recording
    unless --environment.backend is live."""


@dataclass(frozen=True)
class MedusaSettings(ReplayedSettings, BoundedSettings):
    """Learn how many heads and how large a tree Medusa decoding uses, and, with typical acceptance, what it accepts.

    With no option at all: from recordings that ship, with exact acceptance.
    The heads are those in the folder <target>-medusa beside the target's own, or those that ship for it.
    """

    FORMAT = "specgym-medusa-settings-1"
    ABOUT = "a run of Medusa decoding"
    ENV = "specgym/Medusa-v0"
    DECODER = "medusa"
    KNOBS = "Medusa knobs"
    STRAYING = ", or give --acceptance typical"

    workloads: tuple[str, ...] = ("tiny-10m/prose", "tiny-10m/code", "tiny-3m/prose", "tiny-3m/code")
    """What to tune for: target/prompts, or target/prompts@temperature; the target needs heads. Each needs a recording
    unless --environment.backend is live."""
    acceptance: Literal["exact", "typical"] = "exact"
    """Exact: the text is the target's own. Typical: whatever candidate is probable enough under the target is accepted,
    and how probable that is, epsilon and delta, is learned too. Sampled texts then come faster and stray from the
    target, so that --max-divergence should say how far they may; greedy ones stay as they are, and for epsilon and
    delta to matter a workload must sample, as tiny-3m/prose@1.0 does."""
    max_divergence: float | None = None
    """With --acceptance typical, ask for the fastest setting whose mean divergence from the target stays under this
    bound, above 0, instead of the reward's weights. The price of going beyond is learned along, one for each
    workload."""

    def __post_init__(self) -> None:
        require_one_of(self, "acceptance", ("exact", "typical"))
        super().__post_init__()

    @property
    def lossless(self) -> bool:
        """Whether acceptance is exact."""
        return self.acceptance == "exact"

    @property
    def decoder_name(self) -> str:
        """That of the decoder with this acceptance."""
        return self.DECODER if self.lossless else "medusa-typical"

    def check_workloads(self) -> None:
        """As for any decoder; and with typical acceptance a workload must sample."""
        super().check_workloads()
        if not self.lossless and all(workload(name).sampling.greedy for name in self.workloads):
            raise SettingsError(
                "typical acceptance changes sampled texts alone, and every workload is greedy, so epsilon and delta "
                "would do nothing; name a workload that samples, for instance tiny-3m/prose@1.0, or leave out "
                "--acceptance typical"
            )


@dataclass(frozen=True)
class DraftTreeSettings(ReplayedSettings):
    """Learn how wide, deep and large a draft's tree of candidates grows, and how hopeless a branch is that is cut.

    With no option at all: from recordings that ship. The draft must be a model.
    """

    FORMAT = "specgym-draft-tree-settings-1"
    ABOUT = "a run of draft trees"
    ENV = "specgym/DraftTree-v0"
    DECODER = "draft-tree"
    KNOBS = "draft tree knobs"

    workloads: tuple[str, ...] = ("tiny/prose", "tiny/code", "tiny-3m-1l/prose", "tiny-3m-1l/code")
    """What to tune for: pair/prompts, or pair/prompts@temperature. Each needs a recording unless --environment.backend
    is live."""


TUNABLE: dict[str, type[TrainSettings]] = {
    kind.ENV: kind for kind in (ThresholdSettings, LookaheadSettings, MedusaSettings, DraftTreeSettings)
}
"""The settings of every decoder that can be tuned, by the id of its environment."""


def load_settings(path: Path) -> TrainSettings:
    """The settings of a run that tunes a decoder, whichever it is.

    Raises:
        RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
    """
    found = read_json(path, f"is {path.parent} the folder of a run that train.py wrote?").get("format")
    for kind in TUNABLE.values():
        if found == kind.FORMAT:
            return kind.load(path)
    known = ", ".join(kind.FORMAT for kind in TUNABLE.values())
    raise RunFileError(f"{path} does not hold the settings of a run that tunes a decoder ({known}), but of {found!r}")
