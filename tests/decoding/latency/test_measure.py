import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.pipelined.decoder import PipelinedDecoder
from specgym.decoding.drafts.cascade import CascadeDrafter
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.drafts.drafter import Drafter
from specgym.decoding.drafts.mixed import draft_models
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.latency import measure as latency_measure
from specgym.decoding.latency.interleaved import describe_hardware, fingerprint, growth_of, typical
from specgym.decoding.latency.measure import measure, measured
from specgym.decoding.latency.probe import Uncertainty
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.joint.passes import Answer, JoinedPasses, Request
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling

SURE = Uncertainty({}, {}, 0.0, 0.0)
PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.1}, {1: 1.0, 3: 2.0}, 0.9, {"device": "imaginary"}, uncertainty=SURE)


@pytest.fixture
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    target = make_model("llama", layers=1, vocabulary=64, hidden=16, context=64)
    return Pair(target, make_noisy(target, 0.3), name="toy")


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pairs measured, with a measurement that takes no time."""
    pairs: list[str] = []

    def quick(pair: Pair, decoder: None, *, sampling: Sampling) -> LatencyProfile:
        pairs.append(pair.name)
        return replace(PROFILE, autoregressive_seconds=0.9 / len(pairs))

    monkeypatch.setattr(latency_measure, "measure", quick)
    return pairs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_measuring_covers_every_length_up_to_the_longest(pair: Pair, temperature: float) -> None:
    result = measure(pair, max_draft_length=6, repeats=3, sampling=Sampling(temperature=temperature))
    assert list(result.draft_seconds) == [0, 1, 2, 4, 6]
    assert list(result.target_seconds) == [1, 2, 3, 5, 7]
    assert result.pair == "toy"
    assert result.hardware == describe_hardware(pair)
    assert result.uncertainty is not None
    assert list(result.uncertainty.target) == [1, 2, 3, 5, 7]
    assert result.autoregressive_seconds <= result.round(0) * (1 + 1e-9)
    seconds = list(result.target_seconds.values())
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    "drafter",
    [
        PromptLookupDrafter(64),
        NGramDrafter.fit([[1, 2, 3]], 64),
        NGramDrafter.fit([[token % 64 for token in range(200)]], 64),
    ],
    ids=["lookup", "empty table", "full table"],
)
def test_drafters_that_fall_short_are_measured_too(pair: Pair, drafter: Drafter) -> None:
    result = measure(Pair(pair.target, drafter), max_draft_length=8, repeats=4)
    assert list(result.target_seconds) == [1, 2, 3, 5, 9]
    assert 0 in result.draft_seconds


def test_a_full_context_does_not_stop_measuring(pair: Pair) -> None:
    result = measure(pair, max_draft_length=8, repeats=3, prompt=list(range(40)))
    assert set(result.target_seconds) >= {1, 2, 3}


def test_measuring_leaves_the_pair_as_it_was(pair: Pair) -> None:
    draft = pair.draft
    measure(pair, max_draft_length=2, repeats=1)
    assert pair.draft is draft


@pytest.mark.parametrize(
    ("arguments", "message"), [({"repeats": 0}, "repeats"), ({"max_draft_length": 0}, "max_draft_length")]
)
def test_measuring_refuses_numbers_that_are_not_positive(pair: Pair, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be a whole number of at least 1, got 0"):
        measure(pair, **arguments)


@pytest.mark.usefixtures("_own_cache")
def test_a_pair_is_measured_once_until_asked_again(pair: Pair, counted: list[str]) -> None:
    first = measured(pair)
    latency_measure._known.clear()  # as in another process
    assert measured(pair) == first
    assert counted == ["toy"]
    assert measured(pair, refresh=True) != first
    assert counted == ["toy", "toy"]


@pytest.mark.usefixtures("_own_cache")
def test_each_kind_of_arithmetic_has_its_own_profile(pair: Pair, counted: list[str]) -> None:
    for sampling in (Sampling(0.0), Sampling(0.5), Sampling(1.0), Sampling(1.0, top_k=4), Sampling(1.0, top_p=0.9)):
        measured(pair, sampling=sampling)
    assert len(counted) == 4  # the temperature itself costs nothing


@pytest.mark.usefixtures("_own_cache")
def test_a_damaged_cache_is_measured_anew_with_a_warning(
    pair: Pair, counted: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured(pair)
    latency_measure._known.clear()
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        measured(pair)
    assert len(counted) == 2
    assert "cannot be read" in caplog.text
    assert json.loads(file.read_text())["pair"] == "toy"


def test_a_cache_that_cannot_be_written_is_survived(
    pair: Pair, counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "file"))
    first = measured(pair)
    assert measured(pair) is first
    assert "SPECGYM_CACHE" in caplog.text


@pytest.mark.usefixtures("_own_cache")
def test_a_profile_that_contradicts_itself_is_used_and_not_kept(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = replace(PROFILE, autoregressive_seconds=1.11)
    monkeypatch.setattr(latency_measure, "measure", lambda *_, **__: impossible)
    assert measured(pair) is impossible
    assert measured(pair) is impossible  # one process charges everything by one profile
    assert "not kept" in caplog.text
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("_own_cache")
def test_a_cached_profile_that_contradicts_itself_is_measured_anew(
    pair: Pair, counted: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured(pair)
    latency_measure._known.clear()
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    replace(PROFILE, autoregressive_seconds=1.11).save(file)  # as an earlier version has kept it
    assert measured(pair).autoregressive_seconds < 1
    assert counted == ["toy", "toy"]
    assert "a round that drafts nothing takes 1e+03 ms" in caplog.text
    latency_measure._known.clear()
    assert measured(pair).autoregressive_seconds < 1
    assert counted == ["toy", "toy"]


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("spread", [None, 0.6])
def test_profiles_of_a_busy_machine_and_of_earlier_versions_are_not_trusted_for_good(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float | None
) -> None:
    counted: list[str] = []

    def quick(pair: Pair, *_: Any, **__: Any) -> LatencyProfile:
        counted.append(pair.name)
        return PROFILE if spread is None else replace(PROFILE, uncertainty=replace(SURE, spread=spread))

    monkeypatch.setattr(latency_measure, "measure", quick)
    measured(pair)
    if spread is None:
        (file,) = (tmp_path / "cache" / "latency").iterdir()
        replace(PROFILE, uncertainty=None).save(file)
    latency_measure._known.clear()  # as in another process
    measured(pair)
    assert counted == ["toy", "toy"]


@pytest.mark.usefixtures("_own_cache")
def test_a_cached_profile_is_smoothed_within_the_noise(pair: Pair, counted: list[str], tmp_path: Path) -> None:
    measured(pair)
    latency_measure._known.clear()
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    replace(PROFILE, autoregressive_seconds=1.01).save(file)
    assert measured(pair).round(0) == pytest.approx(1.01)
    assert counted == ["toy"]


def test_models_of_another_size_have_another_fingerprint(
    pair: Pair, make_model: Callable[..., PreTrainedModel]
) -> None:
    larger = make_model("llama", layers=2, vocabulary=64, hidden=16, context=64)
    assert fingerprint(Pair(larger, pair.draft, name="toy")) != fingerprint(pair)
    assert fingerprint(Pair(pair.target, PromptLookupDrafter(64), name="toy")) != fingerprint(pair)
    assert fingerprint(Pair(pair.target, pair.draft, name="toy")) == fingerprint(pair)
    helped = CascadeDrafter(draft_models(pair.draft)[0], PromptLookupDrafter(64))
    assert fingerprint(Pair(pair.target, helped, name="toy")) != fingerprint(pair)


def places(profile: LatencyProfile) -> set[tuple[int, int | None]]:
    return {(point.batch_size, point.context) for point in (profile, *profile.points)}


@pytest.mark.parametrize(
    ("family", "sampling"), [("llama", Sampling(0.0)), ("opt", Sampling(0.8, top_k=8))], ids=["greedy", "sampled"]
)
def test_batches_and_contexts_give_a_full_grid_of_times(
    make_model: Callable[..., PreTrainedModel], family: str, sampling: Sampling
) -> None:
    target = make_model(family, layers=1, vocabulary=64, hidden=16, context=64)
    draft = make_model("llama", layers=1, vocabulary=64, hidden=16, context=64, seed=1)
    result = measure(
        Pair(target, draft, name="toy"),
        max_draft_length=4,
        repeats=1,
        prompt=[1, 2, 3, 4, 5],
        sampling=sampling,
        batch_sizes=(3, 2),
        contexts=(20,),
        tries=1,
    )
    assert (result.batch_size, result.context) == (1, 5)
    assert places(result) == {(size, context) for size in (1, 2, 3) for context in (5, 20)}
    for point in result.points:
        assert list(point.draft_seconds) == [0, 1, 2, 4]
        assert list(point.target_seconds) == [1, 2, 3, 5]
        times = [point.draft(1), *point.target_seconds.values(), point.autoregressive_seconds]
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in times)
        assert point.hardware == result.hardware
        assert point.sampling == result.sampling
    assert result.at(batch_size=2, context=12).context == 12


def test_a_batch_alone_is_measured_at_the_context_of_the_live_rounds(pair: Pair) -> None:
    result = measure(pair, max_draft_length=2, repeats=1, batch_sizes=(1, 4), prompt=[1, 2, 3], tries=1)
    assert places(result) == {(1, 3), (4, 3)}


def test_without_batches_and_contexts_only_the_live_point_is_measured(pair: Pair) -> None:
    assert places(measure(pair, max_draft_length=2, repeats=1, prompt=[1, 2, 3], contexts=[3])) == {(1, 3)}


def test_rounds_of_a_batch_are_rounds_of_real_texts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int, int]] = []
    read = JoinedPasses.read

    def watched(self: JoinedPasses, requests: Sequence[Request]) -> list[Answer]:
        longest = max(len(request.tokens) for request in requests)
        name = "target" if self._model.model is pair.target.model else "draft"
        seen.append((name, len(requests), longest, min(request.slot.length for request in requests)))
        return read(self, requests)

    monkeypatch.setattr(JoinedPasses, "read", watched)
    measure(pair, max_draft_length=2, repeats=1, batch_sizes=(5,), contexts=(33,), prompt=[1, 2], tries=1)
    passes = {(name, tokens) for name, texts, tokens, context in seen if texts == 5 and context >= 32}
    assert {("target", tokens) for tokens in (1, 2, 3)} <= passes
    assert ("draft", 1) in passes


def test_a_batch_whose_passes_take_longer_costs_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    read = JoinedPasses.read

    def slow(self: JoinedPasses, requests: Sequence[Request]) -> list[Answer]:
        time.sleep(0.05 if self._model.model is pair.target.model else 0.02)
        return read(self, requests)

    monkeypatch.setattr(JoinedPasses, "read", slow)
    result = measure(pair, max_draft_length=2, repeats=1, batch_sizes=(3,), prompt=[1, 2], tries=1)
    point = result.at(batch_size=3)
    assert point.draft_seconds[2] >= 0.04
    assert min(point.target_seconds.values()) >= 0.05
    assert point.autoregressive_seconds >= 0.05
    assert point.draft_seconds[0] < 0.02


def test_a_grid_leaves_the_models_as_they_were(pair: Pair) -> None:
    tokens = torch.tensor([1, 2, 3])
    before = pair.target.fresh().forward(tokens).scores
    measure(pair, max_draft_length=2, repeats=1, batch_sizes=(2,), contexts=(8,), tries=1)
    assert pair.target.length == 0
    assert torch.equal(pair.target.fresh().forward(tokens).scores, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (1, 0)}, "each of batch_sizes must be a whole number of at least 1, got 0"),
        ({"contexts": (-3,)}, "each of contexts must be a whole number of at least 1, got -3"),
        (
            {"contexts": (60,)},
            "a context of 60 tokens with a draft of 4 .* does not fit in target, whose context is 64",
        ),
        ({"contexts": (50,)}, "a context of 50 tokens .* does not fit in draft, whose context is 40"),
    ],
)
def test_points_that_cannot_be_measured_are_refused_before_anything_is(
    make_model: Callable[..., PreTrainedModel], arguments: dict[str, Any], message: str
) -> None:
    models = {
        name: LanguageModel(make_model("llama", layers=1, vocabulary=64, hidden=16, context=context))
        for name, context in (("target", 64), ("draft", 40))
    }
    for name, model in models.items():
        model.name = name
    with pytest.raises(ValueError, match=message):
        measure(Pair(models["target"], models["draft"]), max_draft_length=4, repeats=10**9, **arguments)


def test_what_some_rounds_read_again_is_in_the_time_of_all(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {5: [1.0, 1.0, 1.0, 5.0], 9: [2.0]}
    assert typical(samples, pair.target) == {5: 1.0}
    assert growth_of(pair) == 16
    monkeypatch.setattr(pair.target, "restores_states", True)
    assert typical(samples, pair.target) == {5: 2.0}
    assert growth_of(pair) == 64


def test_rounds_of_a_pipelined_decoder_are_timed_as_overlapping_ones(pair: Pair) -> None:
    decoder = PipelinedDecoder(pair, max_draft_length=2, place="thread")
    profile = measure(pair, decoder, repeats=1)
    assert (profile.kind, profile.overlaps) == ("pipelined", True)
    assert {*profile.draft_seconds} == {*profile.target_seconds} == {1, 2}
    assert profile.round_of(2, 2) == max(profile.draft(2), profile.target(2))
    assert profile.hardware["pipeline"] == {"draft_threads": 1, "place": "thread", "pinned": False}
