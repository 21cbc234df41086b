"""Settings for learning when to stop a draft."""

from __future__ import annotations

from dataclasses import dataclass

from specgym.decoding import find_hardware, whole_number
from specgym.envs import SHIPPED_WORKLOADS

from ...training.settings_io import require_several
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

    def __post_init__(self) -> None:
        require_several(self, whole_number, "batch_sizes")
        super().__post_init__()
        if self.hardware is not None:
            find_hardware(self.hardware)

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
