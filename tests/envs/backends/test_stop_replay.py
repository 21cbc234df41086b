"""Replay of drafts that end by the rule of an engine: for any threshold, round for round as live decoding does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from transformers import PreTrainedModel

from specgym.decoding import (
    LatencyProfile,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    traits_of,
)
from specgym.decoding.decoders.traits import EngineStop, SpeculativeTraits
from specgym.envs import TokenPrompts, Trace, Workload
from specgym.envs.backends.trace_replay import TraceReplay
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings.archive import TraceError
from tests.helpers.encoder_decoders import encoder_decoder, noisy_decoder

K, TOKENS = 6, 16
PROMPTS = [[1, 2, 3], [4, 5], [6, 2, 9, 9], [7]]
# Draft and target grow unevenly, so that no two ways of drafting cost the same.
PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.003, 7: 0.025}, {1: 0.010, 3: 0.011, 8: 0.019}, 0.010, {})
RULES = get_args(EngineStop)
KINDS = ("model", "ngram", "lookup", "encoder")
"""Drafts; `encoder` is a pair with an encoder, which is read in chains alone."""


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> dict[str, tuple[Workload, Trace]]:
    target = make_model("llama", layers=1, vocabulary=24, hidden=32, context=128, spread=0.6)
    texts = [[int(token) for token in np.random.default_rng(seed).integers(0, 24, 30)] for seed in range(4)]
    drafts: dict[str, Any] = {
        "model": make_noisy(target, 0.1),
        "ngram": NGramDrafter.fit(texts, 24, order=3),
        "lookup": PromptLookupDrafter(24, longest=2),
    }
    result = {}
    translator = encoder_decoder("t5", layers=1, vocabulary=24)
    for name in (*KINDS, "model sampled"):
        sampling = Sampling(0.8 if "sampled" in name else 0.0)
        if name == "encoder":
            pair = Pair(translator, noisy_decoder(translator, 0.2), name=name)
        else:
            pair = Pair(target, drafts[name.split()[0]], name=name)
        work = Workload(pair, TokenPrompts(PROMPTS, PROMPTS), sampling)
        path = tmp_path_factory.mktemp("trace") / "trace.npz"
        result[name] = work, record(work, "train", path, RecordSettings(K, 4, TOKENS, detour_prompts=0))
    return result


def replay(work: Workload, trace: Trace, stop: str) -> TraceReplay:
    return TraceReplay(
        traits_of("speculative"), [trace], [work], [PROFILE], TOKENS, {"max_draft_length": K, "stop": stop}
    )


def settings(trace: Trace, stop: str) -> Iterator[dict[str, float]]:
    """Knobs whose thresholds lie where the file's rounding decides nothing."""
    sureness = trace.confidence if stop == "transformers" else trace.top_ten
    assert sureness is not None
    known = np.unique(np.concatenate([[0.0], sureness[np.arange(K) < trace.drafted[: len(sureness), None]], [1.0]]))
    clear = known[1:] > 1.02 * known[:-1] + 1e-3
    middles = ((known[1:] + known[:-1]) / 2)[clear]
    for number, length in enumerate((0, 2, K, K, K, K) if stop != "never" else (0, 2, K)):
        knobs: dict[str, float] = {"draft_length": length}
        if stop != "never":
            knobs["stop_threshold"] = float(middles[number * (len(middles) - 1) // 5]) if number != 1 else 0.0
        if stop == "llama.cpp":
            knobs["min_draft_length"] = (0, 2, 0, 1, 2, 4)[number]
        yield knobs


@pytest.mark.parametrize(
    ("kind", "stop"), [(kind, stop) for kind in KINDS for stop in RULES if (kind, stop) != ("encoder", "llama.cpp")]
)
def test_greedy_decoding_is_replayed_round_for_round(
    recorded: dict[str, tuple[Workload, Trace]], kind: str, stop: EngineStop
) -> None:
    work, trace = recorded[kind]
    backend = replay(work, trace, stop)
    decoder = SpeculativeDecoder(work.load(), K, stop)
    walk, shorter, unverified = backend._walk, 0, 0
    for knobs in settings(trace, stop):
        rule = SpeculativeTraits.trace_rule(knobs, SpeculativeTraits.checked_options(max_draft_length=K, stop=stop))
        some = (np.array([rule.stop_below]), np.array([rule.fewest]))
        for number, prompt in enumerate(PROMPTS if "model" in kind or stop == "llama.cpp" else PROMPTS[:2]):
            live = decoder.generate(prompt, max_new_tokens=TOKENS, knobs=knobs).rounds
            expected = [(round_.drafted, round_.accepted, len(round_.tokens)) for round_ in live]
            ends = (rule.stop_below, rule.fewest)
            steps = list(walk.walk(number, 0, -1.0, 1.0, rule.draft_length, np.random.default_rng(0), *ends))
            assert [step[1:4] for step in steps] == expected
            many = walk.walk_many(
                np.array([number]), np.array([0]), np.array([-1], np.float32), np.ones(1),
                np.array([rule.draft_length]), np.random.default_rng(0), *some,
            )  # fmt: skip
            assert list(zip(many.drafted, many.accepted, many.taken, strict=True)) == expected
            columns = {name: np.array([value]) for name, value in knobs.items()}
            metrics = backend.decode(np.array([number]), np.array([0]), columns, np.random.default_rng(0))
            assert metrics.seconds[0] == pytest.approx(PROFILE.charge(live))
            together = backend.sums(np.array([number]), np.array([0]), columns, np.random.default_rng(0))
            assert together["seconds"] == pytest.approx(PROFILE.charge(live))
            shorter += sum(0 < round_.drafted < knobs["draft_length"] for round_ in live[:-K])
            unverified += sum(round_.draft_steps > round_.drafted for round_ in live)
    assert (shorter > 0) >= (stop != "never")  # the rule had its say
    assert (unverified > 0) == (stop == "llama.cpp")


@pytest.mark.parametrize("stop", RULES)
def test_a_sampled_text_is_replayed_alone_as_among_many(
    recorded: dict[str, tuple[Workload, Trace]], stop: EngineStop
) -> None:
    work, trace = recorded["model sampled"]
    backend = replay(work, trace, stop)
    lengths = set()
    for seed, knobs in enumerate(settings(trace, stop)):
        columns = {name: np.array([value]) for name, value in knobs.items()}
        where = np.array([seed % 4]), np.zeros(1, np.int64)
        alone = backend.decode(*where, columns, np.random.default_rng(seed))
        together = backend.sums(*where, columns, np.random.default_rng(seed))
        for name, values in together.items():
            assert getattr(alone, name) == pytest.approx(values), name
        lengths.add(float(alone.drafted[0] / alone.rounds[0]))
    assert len(lengths) > 2


def test_texts_side_by_side_have_each_their_threshold(recorded: dict[str, tuple[Workload, Trace]]) -> None:
    work, trace = recorded["model"]
    backend = replay(work, trace, "llama.cpp")
    every = [(number, knobs) for number in range(4) for knobs in settings(trace, "llama.cpp")]
    numbers = np.array([number for number, _ in every])
    columns = {name: np.array([knobs[name] for _, knobs in every]) for name in every[0][1]}
    together = backend.decode(numbers, np.zeros(len(every), np.int64), columns, np.random.default_rng(0))
    for place, (number, knobs) in enumerate(every):
        single = {name: np.array([value]) for name, value in knobs.items()}
        alone = backend.decode(np.array([number]), np.zeros(1, np.int64), single, np.random.default_rng(0))
        for name in ("drafted", "accepted", "rounds", "seconds"):
            assert getattr(together, name)[place] == pytest.approx(getattr(alone, name)[0])


def test_a_trace_of_an_earlier_version_is_refused_for_the_rule_that_needs_more(
    recorded: dict[str, tuple[Workload, Trace]],
) -> None:
    work, trace = recorded["model"]
    earlier = replace(trace, top_ten=None)
    message = r"\(train\) was recorded by an earlier version and has no `top_ten`.* record it again: `python -m specgym"
    with pytest.raises(TraceError, match=message):
        replay(work, earlier, "llama.cpp")
    for stop in ("transformers", "never"):
        replay(work, earlier, stop)
