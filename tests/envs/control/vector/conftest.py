"""Two workloads, and what their decoding costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.trace import Trace
from tests.helpers.drafted_together import CODE, PROSE, random_trace


@pytest.fixture
def traces() -> dict[str, Trace]:
    """Five prompts of one workload and three of another."""
    return {PROSE: random_trace(PROSE, 5, seed=1), CODE: random_trace(CODE, 3, seed=2)}


@pytest.fixture
def profile(profile: LatencyProfile) -> LatencyProfile:
    """Two batch sizes; of the larger, a pass over each further token costs 5 ms."""
    eight = replace(profile, batch_size=8, context=8, target_seconds={1: 0.02, 2: 0.025}, autoregressive_seconds=0.02)
    return replace(profile, context=8, points=(eight,))
