import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from specgym.decoding import latency
from specgym.decoding.decoder import Round
from specgym.decoding.drafters import Drafter
from specgym.decoding.hardware import describe_hardware, fingerprint
from specgym.decoding.latency import LatencyProfile, LatencyProfileError, measure, measured
from specgym.decoding.ngram import NGramDrafter
from specgym.decoding.pairs import Pair
from specgym.decoding.prompt_lookup import PromptLookupDrafter
from specgym.decoding.sampling import Sampling

PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.1, 4: 0.7}, {1: 1.0, 3: 2.0, 5: 2.5}, 0.9, {"device": "imaginary"})


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

    def quick(pair: Pair, *, sampling: Sampling) -> LatencyProfile:
        pairs.append(pair.name)
        return replace(PROFILE, autoregressive_seconds=float(len(pairs)))

    monkeypatch.setattr(latency, "measure", quick)
    return pairs


def cycle(drafted: int) -> Round:
    return Round((1,), drafted, 0, 0.0, 0.0, 0.0)


def test_measured_numbers_are_returned_as_they_are() -> None:
    assert [PROFILE.draft(tokens) for tokens in (0, 1, 4)] == [0.0, 0.1, 0.7]
    assert [PROFILE.target(tokens) for tokens in (1, 3, 5)] == [1.0, 2.0, 2.5]


def test_between_measured_numbers_time_is_linear() -> None:
    assert PROFILE.draft(2) == pytest.approx(0.3)
    assert PROFILE.target(2) == pytest.approx(1.5)
    assert PROFILE.target(4) == pytest.approx(2.25)


def test_beyond_the_last_two_time_goes_on_linearly() -> None:
    assert PROFILE.target(9) == pytest.approx(3.5)
    assert PROFILE.draft(5) == pytest.approx(0.9)


def test_below_the_first_measured_number_time_is_never_negative() -> None:
    assert replace(PROFILE, draft_seconds={2: 0.1, 4: 0.5}).draft(0) == 0.0


def test_a_single_measured_number_stands_for_all() -> None:
    assert replace(PROFILE, draft_seconds={0: 0.25}).draft(7) == 0.25


@given(st.lists(st.integers(0, 40), max_size=8))
def test_rounds_are_charged_for_what_they_drafted(drafted: list[int]) -> None:
    expected = sum(PROFILE.draft(count) + PROFILE.target(count + 1) for count in drafted)
    assert PROFILE.charge([cycle(count) for count in drafted]) == pytest.approx(expected)


@pytest.mark.parametrize(("method", "tokens"), [("draft", -1), ("target", 0), ("round", -1)])
def test_impossible_numbers_of_tokens_are_refused(method: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"at least . tokens, got {tokens}"):
        getattr(PROFILE, method)(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_seconds": {}}, "draft_seconds must have an entry"),
        ({"target_seconds": {0: 1.0}}, "none below 1 tokens"),
        ({"target_seconds": {1: 0.0}}, r"target_seconds\[1\] is 0.0"),
        ({"draft_seconds": {1: float("nan")}}, r"draft_seconds\[1\] is nan"),
        ({"autoregressive_seconds": 0.0}, "autoregressive_seconds is 0.0"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LatencyProfileError, match=message):
        replace(PROFILE, **changes)


def test_a_saved_profile_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    PROFILE.save(path)
    assert LatencyProfile.load(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not a latency profile of this version"),
        ('{"format": "something else"}', "is not a latency profile of this version"),
        ('{"format": "specgym-latency-1"}', "is damaged"),
        (
            '{"format": "specgym-latency-1", "pair": "p", "draft_seconds": [], "target_seconds": [[1, 1.0]], '
            '"autoregressive_seconds": 1.0, "hardware": {}}',
            "is damaged .*draft_seconds must have an entry",
        ),
    ],
)
def test_foreign_and_damaged_files_are_refused_with_a_way_out(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(LatencyProfileError, match=message) as caught:
        LatencyProfile.load(path)
    assert "measure it again" in str(caught.value)
    assert "profile.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyProfileError, match="there is no latency profile"):
        LatencyProfile.load(tmp_path / "none.json")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_measuring_covers_every_length_up_to_the_longest(pair: Pair, temperature: float) -> None:
    found = measure(pair, max_draft_length=6, repeats=3, sampling=Sampling(temperature=temperature))
    assert list(found.draft_seconds) == [0, 1, 2, 4, 6]
    assert list(found.target_seconds) == [1, 2, 3, 5, 7]
    assert found.pair == "toy"
    assert found.hardware == describe_hardware(pair)


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
    found = measure(Pair(pair.target, drafter), max_draft_length=8, repeats=4)
    assert list(found.target_seconds) == [1, 2, 3, 5, 9]
    assert 0 in found.draft_seconds


def test_a_full_context_does_not_stop_measuring(pair: Pair) -> None:
    found = measure(pair, max_draft_length=8, repeats=3, prompt=list(range(40)))
    assert set(found.target_seconds) >= {1, 2, 3}


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


def test_a_pair_without_a_draft_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="a latency profile needs a draft"):
        measured(Pair(pair.target))


@pytest.mark.usefixtures("_own_cache")
def test_a_pair_is_measured_once_until_asked_again(pair: Pair, counted: list[str]) -> None:
    first = measured(pair)
    latency._known.clear()  # as in another process
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
    latency._known.clear()
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


def test_models_of_another_size_have_another_fingerprint(
    pair: Pair, make_model: Callable[..., PreTrainedModel]
) -> None:
    larger = make_model("llama", layers=2, vocabulary=64, hidden=16, context=64)
    assert fingerprint(Pair(larger, pair.draft, name="toy")) != fingerprint(pair)
    assert fingerprint(Pair(pair.target, PromptLookupDrafter(64), name="toy")) != fingerprint(pair)
    assert fingerprint(Pair(pair.target, pair.draft, name="toy")) == fingerprint(pair)
