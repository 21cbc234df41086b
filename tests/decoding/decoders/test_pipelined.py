"""Pipelined decoding: the text is the target's whatever the draft does meanwhile, and whatever becomes of it."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from specgym.decoding.decoders import chain_session
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.pipelined import session as sessions
from specgym.decoding.decoders.pipelined import worker as workers
from specgym.decoding.decoders.pipelined.decoder import PipelinedDecoder, PipelinedThresholdDecoder
from specgym.decoding.decoders.pipelined.worker import Drafted, DraftedText, DraftFailedError, DraftWorker
from specgym.decoding.decoders.stop_rules import ConfidenceBelow
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.errors import ArgumentError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.early_exit import EarlyExit
from specgym.decoding.rounds import Round
from specgym.decoding.sampling import Sampling
from tests.helpers.inline_drafts import work_in_line
from tests.helpers.known_distributions import (
    PROMPT,
    SAMPLINGS,
    MakeTable,
    distance,
    exact_joint,
    p_value_of,
    strayed,
    walk,
)

PLACES = ("process", "thread")
KNOBS = [{"draft_length": window, "pre_verify": pre} for window in (0, 1, 2, 5) for pre in (0, 1)]
Reference = Callable[..., list[list[int]]]
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drafts work in line."""
    work_in_line(monkeypatch)


def table_pair(make_table: MakeTable, vocabulary: int) -> Pair:
    return Pair(make_table(vocabulary, seed=1, spread=1.2), make_table(vocabulary, seed=2, spread=1.0))


@pytest.mark.parametrize("place", PLACES)
def test_greedy_texts_are_what_generate_gives(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, place: Any
) -> None:
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.02)), place=place)
    prompts = [[3 + number, 5, 8][: 1 + number % 3] for number in range(8)]
    won = lost = 0
    for number, (prompt, text) in enumerate(zip(prompts, reference(model, prompts, 32), strict=True)):
        generation = decoder.generate(prompt, max_new_tokens=32, knobs=KNOBS[number])
        assert generation.tokens == text, KNOBS[number]
        for round_ in generation.rounds:
            assert round_.drafted in (round_.target_tokens - 1, round_.target_tokens)
            won += round_.accepted == round_.target_tokens
            lost += round_.accepted < round_.drafted
        # As many workers as texts at a time.
        assert len(decoder._idle) == 1
    assert won > 10 < lost


def test_texts_at_the_same_time_have_a_draft_each(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.02)), place="thread")
    prompts = [[3, 5], [7], [9, 2, 4]]
    expected = [AutoregressiveDecoder(decoder.pair).generate(prompt, max_new_tokens=12).tokens for prompt in prompts]
    together = decoder.generate_batch(prompts, max_new_tokens=12)
    assert [generation.tokens for generation in together] == expected
    first: Any = decoder.start(prompts[0], max_new_tokens=12)
    to_the_end(first)
    others: list[Any] = [decoder.start(prompts[1], max_new_tokens=12)]
    del first  # its draft is the second text's by now
    gc.collect()
    others.append(decoder.start(prompts[2], max_new_tokens=12))
    assert others[0]._worker is not others[1]._worker
    while not all(session.finished for session in others):
        for session in others:
            session.step()
    assert [session.tokens for session in others] == expected[1:]


def test_knobs_may_change_every_round_and_limits_hold(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("gpt2")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.01)), place="thread")
    limit = decoder.pair.target.context_limit
    for longest in (1, 2, 31, limit):
        plain = AutoregressiveDecoder(decoder.pair).generate([7, 9], max_new_tokens=longest)
        session = decoder.start([7, 9], max_new_tokens=longest)
        rounds: list[Round] = []
        while not session.finished:
            rounds.append(session.step(KNOBS[3 * len(rounds) % len(KNOBS)]))
        assert (session.tokens, session.finish_reason) == (plain.tokens, plain.finish_reason)
        assert max(round_.target_tokens for round_ in rounds) == (1 if longest < 3 else 6)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.usefixtures("inline")
def test_the_joint_law_is_the_targets(monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, name: str) -> None:
    decoder = PipelinedDecoder(table_pair(make_table, 2 if name == "plain" else 3))
    sampling = SAMPLINGS[name]
    expected = exact_joint(decoder.pair.target, sampling, PROMPT, 3)
    for window, pre_verify, ahead in ((1, 1, 0), (2, 1, 1), (1, 0, 1), (2, 0, 0)):
        knobs: dict[str, float] = {"draft_length": window, "pre_verify": pre_verify}
        joint, divergence, _ = walk(monkeypatch, decoder, sampling, 3, knobs, ahead=ahead)
        assert distance(joint, expected) < 1e-5, knobs
        assert divergence == 0


@pytest.mark.usefixtures("inline")
def test_wrong_bets_are_found_out(monkeypatch: pytest.MonkeyPatch, make_table: MakeTable) -> None:
    decoder = PipelinedDecoder(table_pair(make_table, 2))
    expected = exact_joint(decoder.pair.target, Sampling(), PROMPT, 3)
    knobs: dict[str, float] = {"draft_length": 2, "pre_verify": 1}
    judge = decoder.session_class._judge

    def never_tested(session: Any, scores: Tensor, proposal: Any, knobs: Any) -> Any:
        verdict = judge(session, scores, proposal, knobs)
        drafted = proposal.tokens.shape[0]
        return verdict._replace(kept=torch.where(verdict.kept == drafted - 1, drafted, verdict.kept))

    with monkeypatch.context() as patch:  # the token of the bet is kept whatever its test says
        patch.setattr(decoder.session_class, "_judge", never_tested)
        assert distance(walk(monkeypatch, decoder, Sampling(), 3, knobs)[0], expected) > 0.02
    with monkeypatch.context() as patch:  # a rejected one is followed by a token of the target's own distribution
        patch.setattr(chain_session, "residual", lambda p, q: p)
        assert distance(walk(monkeypatch, decoder, Sampling(), 3, knobs)[0], expected) > 0.02

    def tested_again(session: Any, p: Tensor, proposal: Any) -> Tensor:
        return chain_session.SpeculativeSession._passes(session, p, proposal)

    with monkeypatch.context() as patch:  # what passed before the bet was known has to pass once more
        patch.setattr(sessions.PipelinedSession, "_passes", tested_again)
        assert distance(walk(monkeypatch, decoder, Sampling(), 3, knobs)[0], expected) > 0.02


@pytest.mark.usefixtures("inline")
def test_threshold_decoding_keeps_its_certificate(monkeypatch: pytest.MonkeyPatch, make_table: MakeTable) -> None:
    decoder = PipelinedThresholdDecoder(table_pair(make_table, 2))
    target = decoder.pair.target
    for fallback, largest in ((0.0, 1e-5), (0.3, 0.3)):
        knobs = {"fallback": fallback, "rollback": 1.0, "draft_length": 2, "pre_verify": 1}
        joint, divergence, _ = walk(monkeypatch, decoder, Sampling(), 3, knobs)
        off = strayed(joint, target, Sampling(), 3)
        assert off[1] <= largest + 1e-5
        assert (off[0] > 1e-3) == (divergence > 1e-3) == (fallback > 0)


def test_sampled_texts_follow_the_target_and_the_seed(make_table: MakeTable) -> None:
    pair, knobs = table_pair(make_table, 3), {"draft_length": 2.0, "pre_verify": 1.0}
    decoders = [PipelinedDecoder(pair, place="process"), PipelinedDecoder(pair, place="thread")]
    decoders[1].generate(PROMPT, max_new_tokens=9)  # what was drafted for other texts does not count
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(500):
        texts = [
            decoder.generate(PROMPT, max_new_tokens=3, sampling=Sampling(), seed=seed, knobs=knobs).tokens
            for decoder in decoders[: 1 + (seed < 40)]
        ]
        assert texts[0] == texts[-1]
        counts[tuple(texts[0])] = counts.get(tuple(texts[0]), 0) + 1
    assert p_value_of(counts, exact_joint(pair.target, Sampling(), PROMPT, 3)) > 1e-3


def test_thresholds_with_a_real_draft(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    decoder = PipelinedThresholdDecoder(Pair(model, make_noisy(model, 0.02)), place="thread")
    plain = AutoregressiveDecoder(decoder.pair).generate([5, 3], max_new_tokens=24)
    draft = AutoregressiveDecoder(Pair(decoder.pair.draft.model)).generate([5, 3], max_new_tokens=24)  # type: ignore[union-attr]
    exact, loose = (
        decoder.generate([5, 3], max_new_tokens=24, knobs={"fallback": fallback, "rollback": 2.0, "draft_length": 3})
        for fallback in (0.0, 1.0)
    )
    assert (exact.tokens, exact.divergence) == (plain.tokens, 0)
    assert loose.tokens == draft.tokens != plain.tokens
    assert loose.divergence > 0
    assert loose.draft_acceptance_rate == 1


def to_the_end(session: chain_session.SpeculativeSession) -> None:
    while not session.finished:
        session.step()


@pytest.fixture
def killed() -> Iterator[Callable[[], int]]:
    """Kill all drafts that work in processes; the number of them."""

    def kill() -> int:
        drafts = [child for child in multiprocessing.active_children() if child.name.startswith("draft of")]
        for child in drafts:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return len(drafts)

    kill()
    yield kill
    kill()


def test_a_killed_draft_leaves_the_rest_of_the_text_to_the_target(
    make_model: MakeModel, make_noisy: MakeModel, killed: Callable[[], int]
) -> None:
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.02)), place="process")
    plain = AutoregressiveDecoder(decoder.pair).generate([5, 3], max_new_tokens=24)
    for rounds in (0, 1, 3):
        session = decoder.start([5, 3], max_new_tokens=24)
        for _ in range(rounds):
            session.step()
        assert killed() == 1
        with pytest.warns(UserWarning, match="was lost .* decoded to its end by the target alone"):
            to_the_end(session)
        assert session.tokens == plain.tokens
    assert killed() == 0
    assert decoder.generate([5, 3], max_new_tokens=24).tokens == plain.tokens
    assert killed() == 1  # the next text has a new one
    assert decoder.generate([5, 3], max_new_tokens=24).tokens == plain.tokens  # and so has one after it was lost idle
    (draft,) = (child for child in multiprocessing.active_children() if child.name.startswith("draft of"))
    assert draft.pid is not None
    del decoder, session
    gc.collect()
    with pytest.raises(ProcessLookupError):  # nor does it stay as a zombie
        os.kill(draft.pid, 0)


def test_a_silent_draft_counts_as_lost(
    make_model: MakeModel, make_noisy: MakeModel, monkeypatch: pytest.MonkeyPatch, killed: Callable[[], int]
) -> None:
    monkeypatch.setattr("specgym.decoding.decoders.pipelined.worker.PATIENCE", 0.05)
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.02)), place="process")
    session = decoder.start([5, 3], max_new_tokens=12)
    (draft,) = (child for child in multiprocessing.active_children() if child.name.startswith("draft of"))
    assert draft.pid is not None
    os.kill(draft.pid, signal.SIGSTOP)
    with pytest.warns(UserWarning, match="was lost"):
        to_the_end(session)
    with pytest.raises(ProcessLookupError):  # nor is it waited for
        os.kill(draft.pid, signal.SIGCONT)
    assert session.tokens == AutoregressiveDecoder(decoder.pair).generate([5, 3], max_new_tokens=12).tokens


def test_an_error_of_the_draft_is_raised(make_table: MakeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PipelinedDecoder(table_pair(make_table, 3), place="thread")
    session: Any = decoder.start(PROMPT, max_new_tokens=12)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(decoder.pair.draft.model.__class__, "forward", fails)  # type: ignore[union-attr]
    with pytest.raises(DraftFailedError, match="RuntimeError: no memory left"):
        session._take(session._ask(2) or 2)


def test_a_draft_that_cannot_begin_a_text_waits_for_the_next(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    decoder = PipelinedDecoder(table_pair(make_table, 3), place="thread")
    draft, text = decoder.worker(), DraftedText(list(PROMPT), 8, Sampling(0.0), (), 0, 0.1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_Text", lambda *_: 1 / 0)
        draft.begin(text)
        draft.ask(len(PROMPT), [], 2)
        with pytest.raises(DraftFailedError, match="ZeroDivisionError"):
            draft.take()
    draft.begin(text)
    draft.ask(len(PROMPT), [], 2)
    assert draft.take() is not None


def test_copies_have_workers_of_their_own(make_table: MakeTable) -> None:
    decoder = PipelinedDecoder(table_pair(make_table, 3), place="thread")
    expected = decoder.generate(PROMPT, max_new_tokens=8).tokens
    assert copy.deepcopy(decoder).generate(PROMPT, max_new_tokens=8).tokens == expected
    gc.collect()  # of the copy
    assert decoder.generate(PROMPT, max_new_tokens=8).tokens == expected


def test_an_error_that_nobody_asked_for_is_not_the_next_texts(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    decoder = PipelinedDecoder(table_pair(make_table, 3), place="thread")
    draft, text = decoder.worker(), DraftedText(list(PROMPT), 8, Sampling(0.0), (), 0, 0.1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(workers._Text, "steps", lambda *_: 1 / 0)
        draft.begin(text)
        draft.ask(len(PROMPT), [], 2)
        assert draft._connection.poll(2.0)  # the error is there when the text is given up
    draft.begin(text)
    draft.ask(len(PROMPT), [], 2)
    assert draft.take() is not None


def test_a_rule_ends_drafts_where_the_draft_is(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    pair = Pair(model, make_noisy(model, 0.02))
    plain = AutoregressiveDecoder(pair).generate([5, 3], max_new_tokens=40)
    rounds = {}
    for rule in (None, ConfidenceBelow(0.9)):
        generation = PipelinedDecoder(pair, place="thread", stop=rule).generate([5, 3], max_new_tokens=40)
        assert generation.tokens == plain.tokens
        rounds[rule] = [round_.draft_steps for round_ in generation.rounds]
    assert max(rounds[None]) == 4
    assert sum(rounds[ConfidenceBelow(0.9)]) < sum(rounds[None])


def test_seconds_are_those_of_the_clock(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.02)), place="thread")
    session = decoder.start([5, 3], max_new_tokens=40)
    while not session.finished:
        started = time.perf_counter()
        round_ = session.step({"draft_length": 3, "pre_verify": 0})
        assert 0 < round_.seconds <= time.perf_counter() - started
        assert 0 <= round_.overlapped_seconds <= min(round_.draft_seconds, round_.verify_seconds) + 1e-9
        assert (round_.draft_seconds > 0) == (round_.draft_steps > 0)


class _Unpicklable(LogitsProcessor):
    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.index_fill(-1, torch.tensor([4]), -torch.inf)


def test_logits_processors_reach_the_draft_if_they_can(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    decoder = PipelinedDecoder(Pair(model, make_noisy(model, 0.0)), place="process")
    options: Any = {"max_new_tokens": 16, "logits_processor": [_Unpicklable()]}
    plain = AutoregressiveDecoder(decoder.pair).generate([5, 3], **options)
    with pytest.warns(UserWarning, match="cannot be pickled .*not this one"):
        assert decoder.generate([5, 3], **options).tokens == plain.tokens


def test_what_cannot_work_beside_the_target_is_refused(
    make_model: MakeModel, make_noisy: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    for draft in (PromptLookupDrafter(96, longest=2), EarlyExit(1)):
        with pytest.raises(ArgumentError, match="needs a draft model that can work while the target does"):
            PipelinedDecoder(Pair(model, draft))
    pair = Pair(model, make_noisy(model, 0.02))
    session = PipelinedDecoder(pair, place="thread").start([5], max_new_tokens=4)
    for asked in (session.draft_one, session.look):
        with pytest.raises(ArgumentError, match="drafts while the target verifies"):
            asked()
    monkeypatch.setattr(multiprocessing.process.current_process(), "_config", {"daemon": True})
    assert PipelinedDecoder(pair).place == "thread"
    with pytest.raises(ArgumentError, match="place='process' forks"):
        PipelinedDecoder(pair, place="process")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(ArgumentError, match="pin=True"):
        PipelinedDecoder(pair, pin=True)


def test_a_worker_goes_from_text_to_text_and_its_thread_ends(make_table: MakeTable) -> None:
    before = set(threading.enumerate())
    worker = DraftWorker(table_pair(make_table, 3), 2, rows=False, place="thread", stop=None)
    (thread,) = set(threading.enumerate()) - before
    text = DraftedText(PROMPT, 4, Sampling(), (), 5, 0.1, 1)
    worker.begin(text)
    worker.ask(len(PROMPT), [], 2)
    first = [worker.take(), worker.take(), worker.take()]
    assert first[2] is None
    worker.begin(replace(text, prompt=(2,)))
    worker.ask(1, [], 1)
    assert isinstance(worker.take(), Drafted)
    assert thread.is_alive()
    worker.close()
    thread.join(60)
    assert not worker.alive
    assert not thread.is_alive()
