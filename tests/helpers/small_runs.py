"""Training of a target's own knobs that is small enough for a test: what is recorded, and what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.outcomes import outcomes_name
from specgym.envs.recordings.trace import trace_name
from specgym.envs.workloads import workload


def target_alone(small_workloads: Sequence[str]) -> tuple[str, str]:
    """The target of the small workloads without their draft, greedy and sampled."""
    target, rest = small_workloads[0].split("+")
    name = f"{target}/{rest.partition('/draft/')[2]}"
    return name, f"{name}@1.0"


def record_little(decoder: str, workloads: Sequence[str], folder: Path, settings: int = 6) -> Path:
    """The outcomes of some workloads' prompts, in a folder, which is returned."""
    few = OutcomeSettings(decoder, settings=settings, prompts=2, tokens=12)
    for name in workloads:
        for split in ("train", "test"):
            record_outcomes(workload(name), split, folder / outcomes_name(name, decoder, split), few)
    return folder


def record_traces(workloads: Sequence[str], folder: Path, max_draft_length: int = 4) -> Path:
    """The traces of some workloads' prompts, in a folder, which is returned."""
    few = RecordSettings(draft_length=max_draft_length, prompts=3, tokens=12, detour_prompts=0)
    for name in workloads:
        for split in ("train", "test"):
            record(name, split, folder / trace_name(name, split), few)
    return folder


def options(env: str, runs: Path, workloads: Sequence[str], recordings: Path | None, **changed: object) -> list[str]:
    """Command-line words of a run `mine` of a few hundred steps."""
    chosen = {
        "--runs": runs, "--name": "mine", "--total-timesteps": 320, "--environments": 8,
        "--environment.recordings": recordings, "--environment.max-new-tokens": 8, "--checkpoint-every": 160,
        "--learning.rollout-steps": 10, "--learning.batch-size": 40, "--learning.epochs": 2,
        "--evaluation.prompts": 2, "--evaluation.max-new-tokens": 8, "--evaluation.during-training": 1, **changed,
    }  # fmt: skip
    words = (str(word) for pair in chosen.items() for word in pair)
    return ["--env", env, "--workloads", *workloads, *words]
