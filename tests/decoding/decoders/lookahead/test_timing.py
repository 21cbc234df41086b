"""Timing whole Lookahead rounds: which sizes, behind which contexts, and what is refused. No test looks at a time."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.errors import PromptError
from specgym.decoding.latency import measure as latency_measure
from specgym.decoding.latency.interleaved import EndlessText, describe_hardware
from specgym.decoding.latency.measure import measure, measured
from specgym.decoding.latency.probe import Uncertainty
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling


@pytest.fixture(scope="module")
def alone(make_model: Callable[..., PreTrainedModel]) -> Pair:
    """A target whose passes are captured once for all tests."""
    return target_alone(make_model)


def target_alone(make_model: Callable[..., PreTrainedModel]) -> Pair:
    return Pair(make_model("llama", layers=1, vocabulary=64, hidden=16, context=256), name="alone")


def lookahead(pair: Pair, **arguments: Any) -> LatencyProfile:
    usual: dict[str, Any] = {"repeats": 1, "max_target_tokens": 12, "prompt": [1, 2, 3, 4, 5]}
    return measure(pair, "lookahead", **(usual | arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (13, [1, 2, 4, 6, 8, 10, 12, 13])])
def test_rounds_of_every_size_are_timed_up_to_the_largest(
    alone: Pair, largest: int, sizes: list[int], temperature: float
) -> None:
    result = lookahead(alone, max_target_tokens=largest, sampling=Sampling(temperature=temperature))
    assert list(result.target_seconds) == sizes
    assert (result.kind, result.draft_seconds, result.batch_size, result.context) == ("lookahead", {0: 0.0}, 1, 5)
    assert result.sampling == ("sampled" if temperature else "greedy")
    assert result.hardware == describe_hardware(alone)


def test_by_default_everything_that_the_knobs_allow_is_covered(make_model: Callable[..., PreTrainedModel]) -> None:
    """With learned positions, which the other tests do not have."""
    target = make_model("opt", layers=1, vocabulary=64, hidden=16, context=256)
    result = measure(Pair(target), "lookahead", repeats=1)
    knobs = {knob.name: knob.high for knob in LookaheadDecoder(Pair(target)).knobs}
    assert max(result.target_seconds) == (knobs["window"] + knobs["guesses"]) * (knobs["ngram"] - 1) == 160
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in result.target_seconds.values())


def test_the_rounds_that_are_timed_read_what_the_profile_says(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, read = target_alone(make_model), list[int]()
    forward = alone.target.model.forward

    def watched(*arguments: Any, **more: Any) -> Any:
        read.append(more["input_ids"].shape[1])
        return forward(*arguments, **more)

    monkeypatch.setattr(alone.target.model, "forward", watched)
    result = lookahead(alone, repeats=2, max_target_tokens=32)
    assert set(result.target_seconds) <= set(read)
    assert max(read) == 32


def test_timed_rounds_stand_behind_others_of_their_kind(alone: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, step = list[EndlessText](), EndlessText.step

    def noted(text: EndlessText, *arguments: Any) -> Any:
        texts.append(text)
        return step(text, *arguments)

    monkeypatch.setattr(EndlessText, "step", noted)
    lookahead(alone)
    runs = [len(list(run)) for _, run in itertools.groupby(texts, key=id)]
    assert len(set(map(id, texts))) % 2 == 0  # two, and two more each time that a busy machine is measured again
    assert min(runs) >= 3
    assert set(runs[1::2]) == {3}  # plain decoding


def test_the_profile_charges_real_rounds_by_what_the_target_read(alone: Pair) -> None:
    result = lookahead(alone)
    done = LookaheadDecoder(alone).generate([1, 2, 3], max_new_tokens=12, knobs={"window": 4, "ngram": 3, "guesses": 3})
    assert result.charge(done.rounds) == pytest.approx(
        sum(result.target(round_.target_tokens) for round_ in done.rounds)
    )


def test_other_contexts_are_timed_behind_texts_of_their_length(alone: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: set[int] = set()
    start = EndlessText.__init__

    def watched(self: EndlessText, decoder: Any, prompt: Any, sampling: Any, **more: Any) -> None:
        prompts.add(len(prompt))
        start(self, decoder, prompt, sampling, **more)

    monkeypatch.setattr(EndlessText, "__init__", watched)
    result = lookahead(alone, contexts=(40, 5, 80))
    assert prompts == {5, 40, 80}
    assert [(point.batch_size, point.context) for point in (result, *result.points)] == [(1, 5), (1, 40), (1, 80)]
    between = result.at(context=60)
    assert (between.kind, list(between.target_seconds)) == ("lookahead", list(result.target_seconds))


def test_a_text_that_has_grown_is_begun_anew(alone: Pair) -> None:
    text = EndlessText(LookaheadDecoder(alone), [1, 2, 3], Sampling(0.0), growth=4)
    for _ in range(300):  # far more than the context holds
        text.step()
        assert text._session is not None
        assert len(text._session.tokens) <= 4 + 16


def test_a_short_context_is_timed_as_far_as_it_has_room_and_says_so(
    make_model: Callable[..., PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    target = make_model("llama", layers=1, vocabulary=64, hidden=16, context=64)
    with caplog.at_level(logging.WARNING):
        result = measure(Pair(target, name="short"), "lookahead", repeats=3, prompt=[1, 2, 3, 4])
    assert (
        max(result.target_seconds) == 80
    )  # two rows of 40 columns, behind 4 tokens and the 16 that a text may grow by
    assert "timed up to 80 tokens, not 160" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_target_tokens": 0}, ValueError, "max_target_tokens must be a whole number of at least 1, got 0"),
        ({"max_target_tokens": 600}, ValueError, "over 600 tokens behind a context of 5 .* of at most 470"),
        ({"max_draft_length": 4}, ValueError, "max_draft_length is not for lookahead rounds.*max_target_tokens"),
        ({"batch_sizes": (1, 4)}, ValueError, r"batch size 1 alone.*roofline\(target, None, .*decoder='lookahead'"),
        ({"contexts": (0,)}, ValueError, "each of contexts must be a whole number of at least 1, got 0"),
        ({"contexts": (245,)}, ValueError, "a context of 245 tokens leaves .* no room.*give a shorter prompt"),
        ({"repeats": 0}, ValueError, "repeats must be a whole number of at least 1, got 0"),
        ({"prompt": []}, PromptError, "the prompt is empty"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is(
    alone: Pair, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lookahead(alone, **({"repeats": 10**9} | arguments))


def test_chains_refuse_the_size_of_lookahead_and_unknown_kinds_are_named(alone: Pair) -> None:
    with pytest.raises(ValueError, match=r"max_target_tokens is not for chain rounds.*max_draft_length"):
        measure(alone, max_target_tokens=8)
    for function in (measure, measured):
        with pytest.raises(ValueError, match="no decoder 'tree'; there are: threshold, speculative, lookahead"):
            function(alone, "tree")


def test_chains_of_a_target_alone_are_refused_with_the_way_out(alone: Pair) -> None:
    for function in (measure, measured):
        with pytest.raises(ValueError, match=r"needs a draft, and pair alone has none.*'lookahead'"):
            function(alone)


def test_pairs_of_one_target_share_the_profile_that_is_kept_apart_from_their_chains(
    alone: Pair,
    make_noisy: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    kinds: list[str] = []

    def quick(pair: Pair, decoder: Any, *, sampling: Sampling) -> LatencyProfile:
        kinds.append("chain" if decoder is None else decoder.cost_kind(greedy=True))
        assert (pair.draft is None) == (decoder is not None)
        sure = Uncertainty({}, {}, 0.0, 0.0)
        return LatencyProfile(pair.name, {0: 0.0}, {1: 1.0}, 0.9, {}, kind=kinds[-1], uncertainty=sure)

    monkeypatch.setattr(latency_measure, "measure", quick)
    alone.target.name = "folder/target"
    drafted = Pair(alone.target, make_noisy(alone.target.model, 0.3), name="drafted")
    first = measured(drafted, "lookahead")
    latency_measure._known.clear()  # as in another process
    assert measured(alone, "lookahead") == first
    assert measured(drafted).kind == "chain"
    assert kinds == ["lookahead", "chain"]
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "latency").iterdir())
    assert names == ["drafted-greedy", "folder_target-lookahead-greedy"]
