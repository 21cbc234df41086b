"""Environments that control the draft length of many texts together, on traces that nobody recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from specgym.decoding import KeepChances
from specgym.envs.control.vector_env import DraftLengthVectorEnv
from specgym.envs.recordings.trace import Trace
from tests.helpers.made_up import trace_info

K, TOKENS = 4, 12
PROSE, CODE, SAMPLED = "tiny/prose", "tiny/code", "tiny/prose@1.0"
COUNTS = ("tokens", "seconds", "drafted", "accepted", "rounds", "remaining_acceptable")
"""Entries of info that are counts or sums."""


def random_trace(
    name: str, prompts: int, seed: int, tokens: int = TOKENS, ending: float = 0.4, **columns: float
) -> Trace:
    """A trace that nobody recorded: drafts of 0 to K tokens, right about two times out of three.

    Args:
        ending: about how many of the texts end early.
        columns: values for all of a column, in place of random ones.
    """
    rng = np.random.default_rng(seed)
    ended = rng.random(prompts) < ending
    lengths = np.where(ended, rng.integers(2, tokens, prompts), tokens)
    rows = int(lengths.sum())

    def column(key: str, high: float = 1.0) -> Any:
        return np.full((rows, K), columns[key]) if key in columns else high * rng.random((rows, K))

    drafted = np.full(rows, int(columns["drafted"])) if "drafted" in columns else rng.integers(0, K + 1, rows)
    temperature = float(name.partition("@")[2] or 0)
    return Trace(
        info=trace_info(workload=name, temperature=temperature, draft_length=K, tokens=tokens),
        prompt_lengths=np.full(prompts, 3),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        ended=ended,
        text=rng.integers(0, 50, rows),
        tokens=rng.integers(0, 50, (rows, K)),
        confidence=column("confidence"),
        entropy=column("entropy", 5.0),
        q=column("q"),
        p=column("p"),
        target_entropy=column("target_entropy"),
        drafted=drafted,
        bins=np.zeros((rows, K), np.uint8),
        match=rng.random((rows, K)) < 0.67,
        distance=column("distance"),
        jump=np.full((rows, K + 1), -1),
        chances=KeepChances.assumed(),
        detour_prompts=np.empty(0, np.int64),
        detour_knobs=np.empty((0, 2)),
        detour_rows=np.empty((0, 0), np.int64),
        matched=rng.integers(0, 4, (rows, K)).astype(np.uint8),
    )


def make(traces: Any, profile: Any, num_envs: int = 6, **changes: Any) -> DraftLengthVectorEnv:
    """Environments that replay traces, with small defaults."""
    arguments = {"max_draft_length": K, "max_new_tokens": TOKENS, "recording": traces, "profile": profile}
    return DraftLengthVectorEnv(num_envs, **(arguments | changes))


def actions_of(rng: np.random.Generator, count: int, stopping: float = 0.4) -> Any:
    """Draw actions, shape (count,), of which about a share of `stopping` stop."""
    return (rng.random(count) < stopping).astype(np.int64)
