"""Numbers that are none, at every public door: refused by an error that names the argument, never deep inside."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from specgym.decoding import GREEDY, HARDWARE, MODEL_SHAPES, Deployment, KnobError, LatencyProfile, Sampling

DOORS = ("decoding", "envs", "callbacks", "agents")
NO_NUMBERS = ("3", [3], math.nan, np.arange(3), 10**400, object())
RESULTS = frozenset(
    {
        "Checkpoint", "DraftTreeRound", "Generation", "KnobRange", "LookaheadRound", "LookaheadStatistics", "MemoryUse",
        "OneHotStep", "Round",
    }
)  # fmt: skip
"""Records that this package makes itself, of what it has measured or read."""
NUMBER = re.compile(r"(int|float)( \| None)?")
NEEDED: dict[str, dict[str, Any]] = {
    "LatencyProfile": {"pair": "p", "draft_seconds": {0: 0.0}, "target_seconds": {1: 1.0},
                       "autoregressive_seconds": 1.0, "hardware": {}},
    "DraftTracker": {"environments": 2, "cost_ratio": 0.1},
    "FixedLength": {"length": 3},
    "ConfidenceBelow": {"threshold": 0.5},
    "EntropyAbove": {"threshold": 0.5},
    "ProductBelow": {"threshold": 0.5},
    "PromptLookupDrafter": {"vocabulary_size": 100},
    "SuffixDrafter": {"vocabulary_size": 100},
    "roofline": {"target": next(iter(MODEL_SHAPES.values())), "draft": None, "hardware": "h100-sxm"},
    "Deployment": {"target": MODEL_SHAPES["opt-1.3b"], "draft": None, "hardware": HARDWARE["h100-sxm"]},
    "round_costs": {"deployment": Deployment(MODEL_SHAPES["opt-1.3b"], None, HARDWARE["h100-sxm"]),
                    "batch_sizes": [1], "longest": 4},
    "ContextLayout": {"ranges": {"a": (0.0, 1.0)}},
    "DraftChoiceEnv": {"backend": "replay"},
    "DraftChoiceVectorEnv": {"num_envs": 2},
    "DraftLengthEnv": {"backend": "replay"},
    "DraftLengthVectorEnv": {"num_envs": 2},
    "TuningEnv": {"backend": "replay"},
    "TuningVectorEnv": {"num_envs": 2},
    "DivergenceBoundCallback": {"bound": 0.1},
    "EarlyStopCallback": {"patience": 2},
    "EntropyScheduleCallback": {"start": 0.1, "end": 0.0},
    "FolderCheckpointCallback": {"save_freq": 10, "save_path": "nowhere"},
    "PlateauCallback": {"patience": 2},
    "RateCallback": {"smoothing": 0.5},
    "KnobSettings": {"decoder": "lookahead", "workloads": ("tiny-3m/prose",)},
    "TunerSettings": {"decoder": "lookahead", "workloads": ("tiny-3m/prose",)},
    "RunSettings": {"workloads": ("tiny/prose",)},
}  # fmt: skip
"""Arguments without which nothing can be called."""
ELSEWHERE = {("roofline", "max_target_tokens")}
"""Numbers that do not belong to rounds of chains, which is what the refusal says."""


def numbers_of_doors() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every public callable that can be called with plain arguments, with each argument that is a number."""
    for door in DOORS:
        module = importlib.import_module(f"specgym.{door}")
        for name in module.__all__:
            entry = getattr(module, name)
            if not callable(entry) or name in RESULTS:
                continue
            try:
                parameters = inspect.signature(entry).parameters.values()
            except (TypeError, ValueError):
                continue
            named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if {p.name for p in named if p.default is p.empty} <= set(NEEDED.get(name, {})):
                for parameter in named:
                    if NUMBER.fullmatch(str(parameter.annotation)) and (name, parameter.name) not in ELSEWHERE:
                        yield name, entry, parameter.name


CASES = list(numbers_of_doors())


@pytest.mark.parametrize(("name", "entry", "argument"), CASES, ids=[f"{name}-{arg}" for name, _, arg in CASES])
def test_a_number_that_is_none_is_refused_by_the_argument_s_name(
    name: str, entry: Callable[..., Any], argument: str
) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"\b{argument}\b.* must be an? .*number"):
            entry(**{**NEEDED.get(name, {}), argument: value})


def test_most_doors_are_among_them() -> None:
    assert len(CASES) > 120
    assert {name for name, _, _ in CASES} > set(NEEDED)


def test_methods_refuse_them_too() -> None:
    profile = LatencyProfile("p", {0: 0.0}, {1: 1.0}, 1.0, {}, context=3)
    for value in (*NO_NUMBERS, True):
        for argument in ("batch_size", "context"):
            with pytest.raises(ValueError, match=f"{argument} must be a whole number"):
                profile.at(**{argument: value})  # type: ignore[arg-type]
    assert Sampling(np.float32(0.0), np.int64(5)) == Sampling(0.0, 5)  # type: ignore[arg-type]
    assert Sampling(0).greedy is GREEDY.greedy is True
    assert issubclass(KnobError, ValueError)
