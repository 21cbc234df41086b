"""The folder of a run of learning to tune, and what it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specgym.envs import trace_in

from ..evaluation.replayed import Problem
from ..experiments.tune_unseen import TunerSettings
from ..export.knob_policy import DESCRIPTION_FILE, WEIGHTS_FILE
from .files import RunFileError
from .run_folder import RunFolder


class TunerRun(RunFolder):
    """Paths within ``runs/<name>/``.

    ==========================================  ============================================================
    ``settings.json``                           the exact configuration
    ``policy.zip``                              the learned policy for Stable-Baselines3
    ``policy.safetensors``, ``policy.json``     the same policy without any framework (`tuner.LearnedTuner`)
    ``knobs.json``                              recommended thresholds, of the workloads and for all of them
    ``table.json``                              the table on held-out prompts
    ``heat_maps.json``                          rewards over all thresholds, with the path that the tuner takes
    ``patterns.json``                           where the best thresholds lie
    ``transfer.json``                           cross-validation, if it was asked for
    ``checkpoints/``                            what ``--resume`` continues from
    ``tensorboard/``                            event files
    ==========================================  ============================================================
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.heat_maps = path / "heat_maps.json"
        self.transfer = path / "transfer.json"

    @property
    def learned(self) -> bool:
        """Whether the policy is complete."""
        return all(file.is_file() for file in (self.policy, self.path / WEIGHTS_FILE, self.path / DESCRIPTION_FILE))

    def require_learned(self) -> None:
        """Raise RunFileError unless the policy is complete."""
        if not self.learned:
            raise RunFileError(
                f"{self.path} holds no finished policy; go on with: python train.py --resume {self.path}"
            )


def problems_of(settings: TunerSettings, names: Sequence[str] | None = None) -> list[Problem]:
    """The workloads of a run as problems to tune, or some of them. Raises as `Problem` and `trace_of`."""
    return [
        Problem(
            name,
            settings.reward,
            prompts_per_measurement=settings.prompts_per_measurement,
            tokens=settings.tokens_per_prompt,
            draft_length=settings.draft_length,
            train=trace_in(settings.traces, name, "train"),
            test=trace_in(settings.traces, name, "test"),
        )
        for name in (settings.workloads if names is None else names)
    ]
