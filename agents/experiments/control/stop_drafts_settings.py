"""Settings for learning when to stop a draft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specgym.decoding import MODEL_SHAPES, find_hardware, one_of, traits_of, whole_number
from specgym.envs import SHIPPED_WORKLOADS

from ...training.settings_io import SettingsError, require_at_least, require_several
from .control_settings import ControlSettings

ENV = "specgym/DraftLength-v0"


@dataclass(frozen=True)
class StopSettings(ControlSettings):
    """Learn when to stop a draft, from recorded texts. With no option at all: on the pairs that ship."""

    EXPERIMENT = "stop-drafts"

    workloads: tuple[str, ...] = SHIPPED_WORKLOADS
    """Workloads to learn on, all together: pair/prompts, or pair/prompts@temperature."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together. With several, the policy learns what each changes, and the table has rows for each;
    measuring larger ones on this machine takes up to a minute more for each pair."""
    hardware: str | None = None
    """Hardware that time is charged for, such as h100-sxm (computed from the size of each pair's models, 512 tokens
    read before; a wrong name lists them all). Defaults to the latency measured on this machine."""
    shapes: tuple[str, str] | None = None
    """Target and draft whose sizes time is computed from, such as llama-3.1-8b llama-3.2-1b, while the recordings say
    how often tokens are accepted. Needs --hardware. Defaults to each pair's own models."""
    shipped_latency: bool = False
    """Charge by the profiles that ship with the package, measured when the machine that they name was idle. Where none
    ships, the pair is measured on this machine."""
    overlap: str | None = None
    """Decoder whose draft goes on while the target verifies, such as pipelined; with --hardware each has a device of
    its own. Defaults to drafting and verifying in turns."""
    pre_verify: int = 1
    """Way of such a target to begin after a rejection: reading on at once (1), or waiting for a draft (0)."""
    in_turns: Path | None = None
    """Finished run that learned on the same workloads in turns. The table of a run with --overlap then has its policies
    and the best rules in turns beside those of this run."""

    def __post_init__(self) -> None:
        require_several(self, whole_number, "batch_sizes")
        super().__post_init__()
        if self.hardware is not None:
            find_hardware(self.hardware)
        if self.shipped_latency and (self.hardware is not None or self.refresh_latency):
            raise SettingsError("shipped_latency is neither for computed times nor for new ones; leave one of them out")
        if self.shapes is not None:
            for shape in self.shapes:
                one_of("each of shapes", shape, tuple(MODEL_SHAPES), error=SettingsError)
            if self.hardware is None:
                raise SettingsError("shapes are for computed times; give --hardware, or leave --shapes out")
        if self.overlap is not None and not traits_of(self.overlap).overlaps:
            raise SettingsError(
                f"overlap is for a decoder whose draft goes on while the target verifies, and that of {self.overlap} "
                "does not; leave --overlap out to learn in turns"
            )
        require_at_least(self, 0, "pre_verify", most=1)
        if self.overlap is None and (self.in_turns is not None or self.pre_verify != 1):
            raise SettingsError("in_turns and pre_verify are for runs with --overlap")

    @property
    def begins_by(self) -> int | None:
        """`pre_verify`, as environments take it: None where the two take turns."""
        return None if self.overlap is None else self.pre_verify

    @property
    def points(self) -> int:
        """Every workload with every batch size."""
        return len(self.workloads) * len(self.batch_sizes)

    @property
    def _divided(self) -> str:
        return " with each batch size"

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--env {ENV}"

    @property
    def stem(self) -> str:
        """Start of a run's default name."""
        return "draftlength"
