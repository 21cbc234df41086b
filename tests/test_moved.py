"""Import paths of earlier versions."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from specgym.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("specgym.agents.numerics", "FiniteRolloutBuffer"),
        ("specgym.agents.stopping.export", "ExportedStopRule"),
        ("specgym.agents.stopping.policy", "StoppingPolicy"),
        ("specgym.agents.vec_adaptor", "VectorEnvAdaptor"),
        ("specgym.callbacks.prioritised_replay", "PrioritisedReplayCallback"),
        ("specgym.decoding.latency_measure", "measured"),
        ("specgym.decoding.lookahead", "LookaheadStatistics"),
        ("specgym.decoding.stopping", "ConfidenceBelow"),
        ("specgym.envs.traces", "Trace"),
        ("specgym.envs.tuning", "TuningEnv"),
        ("specgym.envs.vector_draft_length", "DraftLengthVectorEnv"),
        ("specgym.envs.vector_tuning", "TuningVectorEnv"),
    ],
)
def test_what_was_promised_is_found_where_it_was(path: str, name: str) -> None:
    assert getattr(importlib.import_module(path), name).__name__ == name


@pytest.mark.parametrize("path", sorted(set(MOVED.values())))
def test_a_module_stands_where_it_is_said_to_be(path: str) -> None:
    importlib.import_module(path)


def test_a_function_behind_a_module_of_its_name_can_still_be_called() -> None:
    script = (
        "from specgym.decoding.roofline import MODEL_SHAPES\n"
        "from specgym.decoding import roofline\n"
        "print(roofline(MODEL_SHAPES['opt-6.7b'], MODEL_SHAPES['opt-125m'], 'a100-80gb-sxm').pair)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
