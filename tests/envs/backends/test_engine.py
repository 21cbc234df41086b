"""Engines measured against their own plain decoding: turns, restarts, refusals and sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specgym.decoding import ArgumentError, EngineError, EngineText, PromptSet, SettingIgnoredError
from specgym.envs import EngineBackend
from tests.helpers.fake_engine import PLAIN_SECONDS, Behaviour, FakeEngine, FakeServed

TEXTS = PromptSet("texts", tuple(f"train {place}" for place in range(8)), ("test 0", "test 1"), "made up", "CC0")


def backend(behaviour: Behaviour | None = None, **arguments: object) -> EngineBackend:
    return EngineBackend(FakeEngine(behaviour=behaviour), [TEXTS], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 4])
def test_a_drift_of_the_machine_cancels_in_the_speedup(length: int) -> None:
    texts = [(0, place) for place in range(8)]
    speedups = []
    for drift in (0.0, 0.05):  # a text takes 1.05 times as long as the one before
        compared = backend(Behaviour(drift=drift)).compare({"num_tokens": length}, texts)
        ratios = [np.log(text.plain.seconds / text.drafted.seconds) for text in compared]
        speedups.append(np.mean(ratios))
    assert speedups[0] == pytest.approx(speedups[1], abs=1e-9)
    always_first = np.mean(ratios) - np.log(1.05)
    assert abs(always_first - speedups[0]) > 0.04  # that much a fixed order would be wrong by


def test_metrics_are_sums_of_the_engines_counts() -> None:
    behaviour = Behaviour(alpha=1.0)
    engine = backend(behaviour, max_new_tokens=21)
    metrics = engine.decode(
        np.array([0, 1]), np.array([0, 0]), {"num_tokens": np.array([4.0, 0.0])}, np.random.default_rng(0)
    )
    assert metrics.tokens.tolist() == [20, 20]
    assert metrics.drafted.tolist() == [16, 0]
    assert metrics.accepted.tolist() == [16, 0]
    assert metrics.rounds.tolist() == [4, 20]
    np.testing.assert_allclose(metrics.plain_seconds, 20 * PLAIN_SECONDS)
    np.testing.assert_allclose(metrics.speedup, [20 / (4 * 1.4), 1.0])
    assert behaviour.asked == [None, {"num_tokens": 4.0}]  # no draft is served for a length of 0


def test_a_setting_is_served_once_and_replaced_by_the_next() -> None:
    behaviour = Behaviour()
    with backend(behaviour) as engine:
        for length in (2, 2, 3):
            engine.compare({"num_tokens": length}, [(0, 0)])
            assert behaviour.open == 2  # plain and one setting
    assert behaviour.asked == [None, {"num_tokens": 2}, {"num_tokens": 3}]
    assert behaviour.open == 0


def test_an_engine_that_remembers_never_sees_a_prompt_twice() -> None:
    behaviour = Behaviour(remembers=True)
    engine = backend(behaviour)
    for prompt in (0, 1, 0, 1):
        engine.compare({"num_tokens": 2}, [(0, prompt)])
    drafting = behaviour.prompts[1:]
    assert len(drafting) == 2
    assert all(len(texts) == len(set(texts)) for texts in drafting)


def test_a_setting_that_is_ignored_is_an_error() -> None:
    engine = backend(Behaviour(ignores=True))
    engine.compare({"num_tokens": 3}, [(0, 0)])
    with pytest.raises(SettingIgnoredError, match=r"fake 1 did not follow num_tokens=8.*where the setting means 8"):
        engine.compare({"num_tokens": 8}, [(0, 1)])


def test_drafts_that_the_end_of_a_text_cuts_short_are_no_sign_of_an_ignored_setting() -> None:
    for alpha in (0.0, 0.3):
        for length in (1, 5, 16):
            for tokens in (5, 9, 20, 48):
                engine = backend(Behaviour(alpha=alpha), max_new_tokens=tokens)
                engine.compare({"num_tokens": length}, [(0, place) for place in range(4)])


def test_other_text_than_the_plain_one_is_seen() -> None:
    for strays in (False, True):
        (text,) = backend(Behaviour(strays=strays)).compare({"num_tokens": 3}, [(0, 0)])
        assert text.equal is not strays


def test_an_engine_without_counts_is_timed_all_the_same() -> None:
    engine = backend(Behaviour(counts=False))
    metrics = engine.decode(np.array([0]), np.array([0]), {"num_tokens": np.array([4.0])}, np.random.default_rng(0))
    assert (metrics.drafted[0], metrics.accepted[0]) == (0, 0)
    assert metrics.rounds[0] == metrics.tokens[0]
    assert metrics.speedup[0] > 1


def test_what_is_accepted_of_an_unknown_number_is_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = FakeServed.generate
    monkeypatch.setattr(FakeServed, "generate", lambda *words: replace(generate(*words), drafted=None))
    knobs = {"num_tokens": np.array([4.0])}
    metrics = backend().decode(np.array([0]), np.array([0]), knobs, np.random.default_rng(0))
    assert metrics.mean_acceptance_length[0] > 1
    assert metrics.draft_acceptance_rate[0] == metrics.accepted[0] == 0


def test_prompts_are_chosen_by_their_index() -> None:
    engine = backend()
    assert engine.choose(3) == 3
    with pytest.raises(ArgumentError, match="index of one of the 8 train prompts"):
        engine.choose(8)
    with pytest.raises(ArgumentError, match="at least one set"):
        EngineBackend(FakeEngine(), [])


def test_an_engine_that_dies_while_it_warms_up_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour = Behaviour()
    first = backend(behaviour)
    second = EngineBackend(first.engine, [TEXTS], plain=first)
    second.compare({"num_tokens": 2}, [(0, 0)])

    def die(*_: object) -> EngineText:
        raise EngineError("died")

    with monkeypatch.context() as patched:
        patched.setattr(FakeServed, "generate", die)
        with pytest.raises(EngineError, match="died"):
            second.compare({"num_tokens": 3}, [(0, 0)])
    assert behaviour.open == 0  # the plain one that was borrowed, too
    second.compare({"num_tokens": 3}, [(0, 0)])
    assert behaviour.asked == [None, {"num_tokens": 2}, {"num_tokens": 3}, None, {"num_tokens": 3}]


def test_messages_of_a_chat_are_decoded_in_the_targets_template() -> None:
    behaviour = Behaviour()
    chat = PromptSet("chat", ("Who are you?",), ("Why?",), "made up", "CC0", chat=True)
    EngineBackend(FakeEngine(behaviour=behaviour), [TEXTS, chat]).compare({"num_tokens": 2}, [(0, 0), (1, 0)])
    for prompts in behaviour.prompts:  # of plain decoding and of the setting
        assert prompts[1:] == ["train 0", "<user>Who are you?<answer>"]  # after the warm-up
