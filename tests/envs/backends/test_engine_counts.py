"""Counts of engines, replayed from traces that ship, equal those that the engines told of the same greedy texts.

The engines' counts in tests/fixtures/engines/counts.json were written by ``python -m benchmarks.engine_agreement
--json tests/fixtures/engines/counts.json``, with llama.cpp b11549 (xllamacpp 2026.10.11549), openvino-genai
2026.4.1 and transformers 5.23.0, in float32. transformers with SmolLM2 is left out, whose draft has other probabilities
there (docs/engines.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.errors import ArgumentError
from specgym.envs.backends.replay import EngineCounts, engine_counts
from specgym.envs.recordings.find import find_trace
from specgym.envs.recordings.trace import rounded, tellable_threshold

COUNTS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "engines" / "counts.json").read_text(encoding="utf-8")
)
TOKENS = 48


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_that_the_engine_told(name: str) -> None:
    engine, pair = name.split("/")
    drafted = set()
    for entry in COUNTS[name]:
        trace, _ = find_trace(None, f"{pair}/{entry['prompts']}", "test")
        ours = engine_counts(trace, engine, entry["knobs"], min(TOKENS, trace.info.tokens))
        theirs = [None if counts is None else EngineCounts(*counts) for counts in entry["counts"]]
        assert [counts and mine for counts, mine in zip(theirs, ours, strict=False)] == theirs, entry
        drafted |= {counts.drafted for counts in theirs if counts}
    assert len(drafted) > 20


def test_engines_begin_and_count_differently() -> None:
    trace, _ = find_trace(None, "tiny-10m-2l/prose", "test")
    knobs = {"draft_length": 5.0}
    counts = {name: engine_counts(trace, name, knobs, TOKENS) for name in ("transformers", "llama.cpp", "openvino")}
    assert len({tuple(map(tuple, texts)) for texts in counts.values()}) == 3
    assert [text.rounds for text in counts["openvino"]] == [text.rounds for text in counts["llama.cpp"]]
    assert all(text == EngineCounts(0, 0, 0) for text in engine_counts(trace, "llama.cpp", knobs, 1))


@given(st.floats(0.001, 1), st.floats(0.001, 1))
def test_a_tellable_threshold_compares_with_what_was_rounded_as_before(threshold: float, probability: float) -> None:
    chosen = tellable_threshold(threshold)
    assert chosen == pytest.approx(threshold, rel=0.005)
    near = np.array([probability, *(chosen * (1 + share) for share in (-1e-6, 1e-6))], np.float32)
    assert ((near < np.float32(chosen)) == (rounded(near) < np.float32(chosen))).all()


def test_no_threshold_stays_none() -> None:
    assert tellable_threshold(0) == 0


@pytest.mark.parametrize(
    ("workload", "changed", "message"),
    [
        ("tiny-10m-2l/prose@0.7", {}, "replayed of greedy texts, and those of tiny-10m-2l/prose@0.7 are sampled"),
        ("tiny-10m-2l/prose", {"engine": "vlm"}, "engine must be one of .* got 'vlm'"),
        ("tiny-10m-2l/prose", {"knobs": {"draft_length": 17.0}}, "draft_length must be a whole number from 0 to 16"),
        ("tiny-10m-2l/prose", {"tokens": 65}, "tokens must be a whole number from 1 to 64"),
    ],
)
def test_what_cannot_be_replayed_is_refused(workload: str, changed: dict[str, Any], message: str) -> None:
    trace, _ = find_trace(None, workload, "test")
    usual: dict[str, Any] = {"engine": "vllm", "knobs": {"draft_length": 3.0}, "tokens": 8}
    with pytest.raises(ArgumentError, match=message):
        engine_counts(trace, **usual | changed)
