"""Mixed traces that nobody recorded, and mixed profiles that nobody measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from specgym.decoding import KeepChances, bins_of
from specgym.decoding.latency.mixed_profile import DraftCosts, MixedProfile
from specgym.envs.recordings.mixed_trace import MixedTrace
from specgym.envs.recordings.trace import Trace
from tests.helpers.made_up import trace_info

LONGEST_MATCH = 3
VOCABULARY = 50


def made_up_mixed(
    name: str = "tiny/prose",
    *,
    free: Sequence[bool] = (False, False, True, True),
    right: Sequence[float] = (0.7, 0.8, 0.9, 0.5),
    prompts: int = 4,
    tokens: int = 12,
    longest: int = 4,
    ending: float = 0.3,
    split: str = "train",
    seed: int = 0,
) -> MixedTrace:
    """A mixed trace of random texts; models always draft `longest` tokens, free drafts any number up to that.

    Args:
        name: of the workload; a temperature in it makes the trace a sampled one.
        free: of each draft.
        right: share of each draft's tokens that are the target's, or of which a sampled one is kept.
        prompts: number of texts.
        tokens: of each text, at most.
        longest: K.
        ending: about how many of the texts end early.
        split: of the prompts.
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    ended = rng.random(prompts) < ending
    lengths = np.where(ended, rng.integers(2, tokens, prompts), tokens)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    text = rng.integers(0, VOCABULARY, int(starts[-1]))
    temperature = float(name.partition("@")[2] or 0)
    info = trace_info(
        workload=name, split=split, temperature=temperature, draft_length=longest, tokens=tokens, longest_prompt=3
    )
    drafts = tuple(f"{'table' if is_free else 'model'}-{place}" for place, is_free in enumerate(free))
    traces = []
    for draft, is_free, share in zip(drafts, free, right, strict=True):
        cells = (len(text), longest)
        match = rng.random(cells) < share
        following = np.minimum(np.arange(len(text))[:, None] + np.arange(longest), len(text) - 1)
        drafted = rng.integers(0, longest + 1, len(text)) if is_free else np.full(len(text), longest)
        reached = np.arange(longest) < drafted[:, None]
        matched = np.where(reached & is_free, rng.integers(1, LONGEST_MATCH + 1, cells), 0)
        confidence = matched / LONGEST_MATCH if is_free else rng.uniform(0.1, 1, cells)
        q = np.ones(cells) if is_free else confidence * (rng.uniform(0.2, 1, cells) if temperature else 1)
        p = np.where(match, q, q * rng.random(cells))
        match &= reached
        traces.append(
            Trace(
                info=replace(info, draft=draft),
                prompt_lengths=np.full(prompts, 3),
                starts=starts,
                ended=ended,
                text=text,
                tokens=np.where(reached, np.where(match, text[following], (text[following] + 1) % VOCABULARY), 0),
                confidence=confidence.astype(np.float32),
                entropy=(np.zeros(cells) if is_free else 3 * rng.random(cells)).astype(np.float32),
                q=np.where(reached, q, 0).astype(np.float32),
                p=np.where(reached, p, 0).astype(np.float32),
                target_entropy=np.where(reached, 3 * rng.random(cells), 0).astype(np.float32),
                drafted=drafted,
                bins=np.where(reached, bins_of(confidence), 0).astype(np.uint8),
                match=match,
                distance=np.where(reached, 1 - p, 0).astype(np.float32),
                jump=np.full((len(text), longest + 1), -1),
                chances=KeepChances.assumed(),
                detour_prompts=np.empty(0, np.int64),
                detour_knobs=np.empty((0, 2)),
                detour_rows=np.empty((0, 0), np.int64),
                top_ten=(confidence if is_free else np.sqrt(confidence)).astype(np.float32),
                matched=matched,
            )
        )
    return MixedTrace(replace(info, draft=",".join(drafts)), drafts, tuple(free), tuple(traces))


def made_up_costs(trace: MixedTrace, drafting: float = 0.1, reading: float = 0.02) -> MixedProfile:
    """A profile of a mixed trace's drafts, by which plain decoding takes 1 second a token.

    Args:
        trace: whose drafts cost time.
        drafting: seconds of a token of the first model that has one token to read; the second model takes twice as
            long, and so on. A free draft takes a microsecond.
        reading: seconds that every token more adds to a pass of the target, and a tenth of it to that of a model.
    """
    drafts, models = [], 0
    for name, free in zip(trace.drafts, trace.free, strict=True):
        models += not free
        first, last = (1e-6, 1e-6) if free else (models * drafting, models * drafting + 63 * reading / 10)
        drafts.append(DraftCosts(name, free, {1: first, 64: last}))
    return MixedProfile("toy", tuple(drafts), {1: 1.0, 33: 1.0 + 32 * reading}, 1.0, {}, context=3)
