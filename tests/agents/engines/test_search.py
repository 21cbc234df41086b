"""Searches over an engine: budgets, when they stop, what they recommend, and how they go on after an end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from specgym.agents.engines.search import EngineSearch
from specgym.agents.engines.settings import MethodName
from specgym.agents.engines.trials import Journal, Measuring, Trial
from specgym.decoding import LOOKUP, EngineText, PromptSet
from specgym.envs import ComparedText, EngineBackend
from tests.helpers.fake_engine import Behaviour, FakeEngine

TEXTS = [
    PromptSet(name, tuple(f"{name} train {place}" for place in range(9)), (f"{name} test",), "made up", "CC0")
    for name in ("first", "second")
]


def search_of(
    behaviour: Behaviour, path: Path, method: MethodName = "tuner", measurements: int = 8, seconds: float = 1e9
) -> EngineSearch:
    backend = EngineBackend(FakeEngine(behaviour=behaviour), TEXTS, max_new_tokens=40)
    measuring = Measuring({"draft": backend}, Journal.at(path / "measurements.json"), prompts=3, seed=0)
    return EngineSearch(measuring, method, temperature=0.0, measurements=measurements, seconds=seconds)


@pytest.mark.parametrize("method", ["tuner", "closed-form", "gp", "tpe"])
def test_a_good_draft_is_recommended_with_a_longer_draft_than_a_bad_one(method: MethodName, tmp_path: Path) -> None:
    lengths = {}
    for alpha in (0.45, 0.9):
        search = search_of(Behaviour(alpha=alpha, token_cost=0.1), tmp_path / str(alpha), method)
        (tmp_path / str(alpha)).mkdir()
        best = search.run()
        assert best is not None
        assert len(search.trials) <= 8
        lengths[alpha] = best.knobs["num_tokens"]
    assert lengths[0.9] > lengths[0.45]
    assert lengths[0.9] >= 5  # the best is 9 by the closed form, and 5 gives 0.94 of it


@pytest.mark.parametrize("method", ["tuner", "gp"])
def test_a_draft_that_costs_too_much_is_not_recommended(method: MethodName, tmp_path: Path) -> None:
    search = search_of(Behaviour(alpha=0.3, token_cost=0.8), tmp_path, method)
    assert search.run() is None
    assert search.trials


def test_a_setting_that_is_slower_on_one_set_of_prompts_is_not_recommended_unless_asked(tmp_path: Path) -> None:
    search = search_of(Behaviour(alpha=0.9), tmp_path)
    assert search.run() is not None
    for trial in search.trials:  # as if the second set had been slow
        slowed = []
        for text in trial.texts:
            seconds = 1.03 * text.plain.seconds if text.workload == 1 else text.drafted.seconds
            drafted = text.drafted.__class__(**{**vars(text.drafted), "seconds": seconds})
            slowed.append(text.__class__(**{**vars(text), "drafted": drafted}))
        object.__setattr__(trial, "texts", slowed)
    best = search.recommended()
    assert best is None
    search._slower_sets = True
    assert search.recommended() is not None


@pytest.mark.parametrize(("spread", "recommended"), [(0.02, True), (0.3, False)])
def test_a_setting_that_may_be_slower_is_not_recommended(spread: float, recommended: bool, tmp_path: Path) -> None:
    search = search_of(Behaviour(), tmp_path)
    texts = []
    for place in range(12):
        speedup = 1.05 + (spread if place % 2 else -spread)
        plain, drafted = (EngineText("", None, 41, seconds) for seconds in (1.0, 1 / speedup))
        texts.append(ComparedText(place // 6, place, plain, drafted, True))
    search.trials = [Trial("draft", {"num_tokens": 4.0}, "made up", texts, 1.0)]
    assert (search.recommended() is not None) is recommended


def test_a_search_keeps_its_measurements_and_its_time(tmp_path: Path) -> None:
    few = search_of(Behaviour(), tmp_path, measurements=3)
    few.run()
    assert len(few.trials) == 3
    (tmp_path / "other").mkdir()
    none = search_of(Behaviour(), tmp_path / "other", seconds=0.0)
    none.run()
    assert len(none.trials) <= 1  # nothing is known of how long the first one takes


def test_a_killed_search_goes_on_with_what_it_had_measured(tmp_path: Path) -> None:
    whole = search_of(Behaviour(), tmp_path)
    best = whole.run()
    journal = Journal.at(tmp_path / "measurements.json")
    count = len(journal.trials)
    assert count == len(whole.trials)
    (tmp_path / "killed").mkdir()
    killed = search_of(Behaviour(), tmp_path / "killed")
    measure = killed._measuring.measure

    def dying(draft: str, knobs: dict[str, float], why: str) -> Trial:
        if len(killed.trials) == 3:
            raise KeyboardInterrupt
        return measure(draft, knobs, why)

    killed._measuring.measure = dying  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    behaviour = Behaviour()
    resumed = search_of(behaviour, tmp_path / "killed")
    again = resumed.run()
    assert best is not None
    assert again is not None
    assert again.knobs == best.knobs
    assert again.speedup == pytest.approx(best.speedup)
    assert [trial.knobs for trial in resumed.trials] == [trial.knobs for trial in whole.trials]
    measured = sum(len(trial.texts) for trial in resumed.trials[3:])
    warm_ups = len(behaviour.asked)
    assert behaviour.texts == 2 * measured + warm_ups  # the first three were not measured again


def test_an_ignored_setting_is_noted_and_others_are_tried(tmp_path: Path) -> None:
    search = search_of(Behaviour(ignores=True, alpha=0.9, token_cost=0.05), tmp_path)
    search.run()
    failed = [trial for trial in search.trials if trial.failed]
    assert failed
    assert all("did not follow" in trial.failed for trial in failed)


def test_practice_on_traces_is_charged_by_the_engine_and_measured_on_it(tmp_path: Path) -> None:
    lengths = {}
    for cost in (0.02, 0.5):
        (tmp_path / str(cost)).mkdir()
        search = search_of(Behaviour(alpha=0.7, token_cost=cost), tmp_path / str(cost))
        search._measuring.backends["draft"].engine.name = "vllm"  # type: ignore[misc]  # whose drafts have one length
        search._recorded = ("tiny/prose", "tiny/code", "tiny-10m-lookup/prose")
        search.run()
        rehearsed = [trial for trial in search.trials if trial.why == "practice"]
        assert 1 <= len(rehearsed) <= 2
        assert all(trial.texts for trial in rehearsed)
        lengths[cost] = rehearsed[0].knobs["num_tokens"] if rehearsed[0].knobs else 0
    assert lengths[0.02] > lengths[0.5]


def test_texts_that_end_with_their_first_token_are_left_out(tmp_path: Path) -> None:
    search = search_of(Behaviour(alpha=0.9, short="second"), tmp_path)
    best = search.run()
    assert best is not None
    assert len(best.by_set) == 1
    assert math.isfinite(best.speedup)
    (tmp_path / "all").mkdir()
    none = search_of(Behaviour(short="train"), tmp_path / "all")
    assert none.run() is None
    assert "no text was longer than its first tokens" in none.trials[0].failed


def test_an_engine_without_counts_is_searched_by_speed(tmp_path: Path) -> None:
    search = search_of(Behaviour(counts=False, alpha=0.9, token_cost=0.05), tmp_path)
    best = search.run()
    assert best is not None
    assert best.speedup > 1.5
    assert search.notes == ["fake does not tell what it drafts from draft, so gp proposes its settings."]


def test_a_look_up_that_finds_nothing_is_told_from_one_that_is_not_counted(tmp_path: Path) -> None:
    search = search_of(Behaviour(silent=True), tmp_path)
    search._measuring.backends["draft"].engine.draft = LOOKUP
    assert search.run() is None
    assert search.notes == ["draft drafted nothing, so gp proposes its settings."]
