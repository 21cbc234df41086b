"""Greedy decoding with draft trees gives, token for token, what `transformers` generates."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding import DraftTreeDecoder, Pair, load_pair, load_prompts
from specgym.decoding.decoder import Session
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeRound
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, PredictorShape
from specgym.decoding.decoders.draft_tree.pruning import PRUNERS, RULES
from specgym.decoding.rounds import Round
from specgym.decoding.sampling import Sampling

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
Knobs = Callable[[int], Mapping[str, float]]
"""Knobs of a round by its number."""

NEW = 24


def changing(seed: int, threshold: bool = True) -> Knobs:
    """Other knobs in every round, from the whole of their ranges; with a threshold for pruning, or without."""
    rng = random.Random(seed)
    return lambda number: {
        "max_candidates": rng.randint(1, 8),
        "max_depth": rng.randint(0, 8),
        "node_budget": rng.choice((0, 1, 4, 16, 64)),
        **({"min_acceptance_prob": rng.choice((0.0, 0.001, 0.05, 0.4, 1.0))} if threshold else {}),
    }


def nothing(number: int) -> Mapping[str, float]:
    return {}


def decode(decoder: DraftTreeDecoder, prompt: Sequence[int], new: int, knobs: Knobs) -> tuple[Session, list[Round]]:
    """A finished session and its rounds."""
    session = decoder.start(prompt, max_new_tokens=new, seed=0)
    rounds: list[Round] = []
    while not session.finished:
        asked = decoder.resolve_knobs(knobs(len(rounds)))
        room = session._room
        rounds.append(session.step(asked))
        round_ = rounds[-1]
        assert isinstance(round_, DraftTreeRound)
        assert session.target.length == len(session.context) - 1
        assert round_.drafted + (round_.pruned if not decoder.rule.random else 0) <= asked["node_budget"]
        assert round_.accepted <= min(round_.drafted, asked["max_depth"], max(room, 0))
        assert round_.draft_steps <= asked["max_depth"]
        assert round_.target_tokens == round_.drafted + 1
        assert round_.divergence == 0
    assert [token for round_ in rounds for token in round_.tokens] == session.tokens
    return session, rounds


class Tally:
    """Counts of what was verified, so that a test shows that every outcome came up."""

    def __init__(self) -> None:
        self.accepted = self.rejected = self.pruned = self.lost = 0
        self.lengths: set[int] = set()

    def add(self, rounds: Sequence[Any]) -> None:
        self.accepted += sum(round_.accepted for round_ in rounds)
        self.rejected += sum(round_.drafted - round_.accepted for round_ in rounds)
        self.pruned += sum(round_.pruned for round_ in rounds)
        self.lost += sum(round_.lost for round_ in rounds)
        self.lengths |= {round_.accepted for round_ in rounds}


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of one token, five, nine and thirteen."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, vocabulary, (1 + 4 * (number % 4),), generator=generator).tolist() for number in range(count)
    ]


@pytest.mark.parametrize(("family", "first", "step"), [("llama", 0, 1), ("opt", 0, 4), ("gpt2", 1, 4)])
def test_greedy_output_on_random_models_equals_generate(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, family: str, first: int, step: int
) -> None:
    """Every rule with every pruning and draft on the first family; on the others every fourth of these."""
    model = make_model(family, vocabulary=48)
    prompts = random_prompts(16, 48)
    expected = reference(model, prompts, NEW)
    drafts = [make_noisy(model, 0.02), make_noisy(model, 0.3), make_model(family, vocabulary=48, layers=1, seed=5)]
    tally = Tally()
    cases = itertools.product([Pair(model, draft) for draft in drafts], RULES, (None, *PRUNERS))
    for number, (pair, rule, pruning) in list(enumerate(cases))[first::step]:
        decoder = DraftTreeDecoder(pair, rule, pruning=pruning)
        knobs = changing(number, threshold=pruning is not None) if number % 3 else nothing
        place = (number + number // 16) % 16  # of all lengths in turn
        session, rounds = decode(decoder, prompts[place], NEW, knobs)
        assert session.tokens == expected[place], (rule, pruning)
        assert session.finish_reason == "length"
        tally.add(rounds)
    assert min(tally.accepted, tally.rejected, tally.pruned) > 100 / step, vars(tally)
    assert tally.lost > 10 / step
    assert tally.lengths >= set(range(4)), vars(tally)


def random_guidance(draft: int, target: int, weight: float) -> dict[str, Any]:
    """An alignment and a predictor that know nothing."""
    torch.manual_seed(draft)
    alignment = AffineAlignment(draft, target)
    predictor = AcceptancePredictor(PredictorShape(target, deepest=3, width=8, aligned_scores=weight > 0.5))
    with torch.no_grad():
        for parameter in (*alignment.parameters(), *predictor.parameters()):
            parameter.normal_()
    return {"alignment": alignment, "alignment_weight": weight, "predictor": predictor}


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_greedy_output_with_guidance_that_knows_nothing_equals_generate(
    make_model: MakeModel, reference: Reference, weight: float
) -> None:
    model = make_model("llama", vocabulary=48)
    prompts = random_prompts(6, 48)
    tally = Tally()
    narrow = make_model("llama", vocabulary=48, hidden=16, layers=1)
    for number, (prompt, tokens) in enumerate(zip(prompts, reference(model, prompts, NEW), strict=True)):
        for draft, width in ((narrow, 16), (model, 32)):
            guidance = random_guidance(width, 32, weight)
            decoder = DraftTreeDecoder(Pair(model, draft), list(RULES)[number % 3], **guidance)
            session, rounds = decode(decoder, prompt, NEW, changing(number))
            assert session.tokens == tokens
            assert any(isinstance(round_, DraftTreeRound) and round_.prediction_seconds for round_ in rounds)
            tally.add(rounds)
    assert min(tally.rejected, tally.pruned) > 50, vars(tally)
    assert tally.accepted > 0


@pytest.mark.parametrize(("name", "prompts"), [("tiny-3m-1l", "prose"), ("tiny", "code"), ("tiny-10m-3m", "chat")])
def test_greedy_output_of_shipped_pairs_equals_generate(reference: Reference, name: str, prompts: str) -> None:
    pair = load_pair(name, prepack=False)
    ids = [pair.encode(text)[-48:] for text in load_prompts(prompts).split("test")[:2]]
    expected = reference(pair.target.model, ids, 32)
    tally = Tally()
    for number, (prompt, tokens) in enumerate(zip(ids, expected, strict=True)):
        for decoder in (DraftTreeDecoder(pair), DraftTreeDecoder(pair, "distinct", pruning="ratio")):
            session, rounds = decode(decoder, prompt, 32, changing(number))
            assert session.tokens == tokens
            tally.add(rounds)
    assert min(tally.accepted, tally.rejected, tally.pruned) > 0, vars(tally)


def test_a_text_that_ends_at_the_context_limit_equals_generate(make_model: MakeModel, reference: Reference) -> None:
    model, draft = make_model("llama", vocabulary=12, context=40), make_model("llama", vocabulary=12, context=40)
    shorter = make_model("llama", vocabulary=12, context=30)
    prompts = [[1, 2] * 10, [2, 5, 2] * 10, list(range(12)) * 3, [4] * 38, [5] * 39]
    accepted = 0
    for prompt in prompts:
        (tokens,) = reference(model, [prompt], 40 - len(prompt))
        for number, drafter in enumerate((draft, shorter)):
            for rule in RULES:
                session, rounds = decode(DraftTreeDecoder(Pair(model, drafter), rule), prompt, 99, changing(number))
                assert session.tokens == tokens
                assert session.finish_reason == "context"
                accepted += sum(round_.accepted for round_ in rounds)
                if drafter is shorter and len(prompt) > 30:
                    assert not any(round_.drafted for round_ in rounds)
    assert accepted > 50


def test_a_text_that_ends_within_an_accepted_path_ends_where_generate_ends_it(
    make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("opt", vocabulary=12)
    prompts = random_prompts(8, 12)
    within = ended = 0
    for end in (0, 5, 9):
        model.generation_config.eos_token_id = [end]
        pair = Pair(model, make_model("opt", vocabulary=12))
        for number, (prompt, tokens) in enumerate(zip(prompts, reference(model, prompts, NEW), strict=True)):
            session, rounds = decode(DraftTreeDecoder(pair), prompt, NEW, changing(number))
            assert session.tokens == tokens
            ended += session.finish_reason == "eos"
            within += rounds[-1].accepted == len(rounds[-1].tokens)
    model.generation_config.eos_token_id = None
    assert ended > 5
    assert within > 2


def test_what_the_draft_keeps_is_what_it_would_have_read_anew(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama", vocabulary=48)
    pair = Pair(model, make_noisy(model, 0.1))
    for rule in RULES:
        decoder = DraftTreeDecoder(pair, rule)
        session = decoder.start([3, 1, 4, 1, 5], max_new_tokens=60, sampling=Sampling(0.7), seed=2)
        kept = 0
        while not session.finished:
            round_ = session.step(changing(len(session.tokens))(0))
            draft = session.draft._model
            kept = max(kept, round_.accepted)
            if session.finished:
                break
            unread = torch.tensor(session.context[draft.length :])
            assert len(unread) >= 1
            followed = copied(draft).forward(unread, last=1).scores
            anew = draft.fresh().forward(torch.tensor(session.context), last=1).scores
            torch.testing.assert_close(followed, anew, rtol=1e-3, atol=1e-3)
        assert kept > 1


def copied(model: Any) -> Any:
    """A language model with a copy of the cache."""

    other = copy.copy(model)
    other._cache = copy.deepcopy(model._cache)
    return other
