"""Texts stay the target's where the drafts of a mixed pair take turns within a proposal, whoever hands over to whom.

Joint laws are exact, over all random choices of toy models (`walk`), or held against thousands of seeded texts by a
chi-square test; greedy texts are plain decoding's. Wrong combinations fail the same tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders import chain_session
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.chain_session import SpeculativeSession
from specgym.decoding.decoders.threshold import ThresholdDecoder, ThresholdSession
from specgym.decoding.drafts.cascade import CascadeDrafter
from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.drafter import DraftStep, ModelDrafter, Proposal
from specgym.decoding.drafts.mixed import MixedDraft
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.loading.pair import Pair
from specgym.decoding.rounds import Round
from specgym.decoding.sampling import Sampling
from tests.helpers.known_distributions import (
    PROMPT,
    SAMPLINGS,
    MakeTable,
    distance,
    exact_joint,
    make_drafter,
    p_value_of,
    strayed,
    walk,
)

TABLE, MODEL = 0, 1
"""Numbers of the drafts of `mixed_pair`."""
Next = Callable[[SpeculativeSession], int]
"""The draft that proposes the next token of a round."""
SIGNIFICANCE = 1e-3
LENGTH = 2
"""Tokens drafted in a round, at most."""


def table_first(session: SpeculativeSession) -> int:
    """A table's token, and a model's after it."""
    return (TABLE, MODEL)[len(session._drafted)]


def model_first(session: SpeculativeSession) -> int:
    """A model's token, and a table's after it."""
    return (MODEL, TABLE)[len(session._drafted)]


def by_what_was_drawn(session: SpeculativeSession) -> int:
    """The model until it draws something unlikely, and the table from there on: the choice sees what was drawn."""
    unlikely = any(step.drawn_probability() < 0.4 for step in session._drafted)
    return TABLE if unlikely else MODEL


TURNS: dict[str, Next] = {"table first": table_first, "model first": model_first, "by draws": by_what_was_drawn}


class Turns(SpeculativeSession):
    """Rounds in which the drafts take turns; where a draft knows no token the other goes on."""

    def _round(self, knobs: Mapping[str, float]) -> Round:
        decoder: Any = self.decoder
        while len(self._drafted) < LENGTH:
            draft = decoder.turns(self)
            if self.draft_one(draft) is None and self.draft_one(1 - draft) is None:
                break
        return self.verify(knobs)


class ThresholdTurns(Turns, ThresholdSession):
    """Rounds of drafts that take turns, verified by thresholds."""


class SpeculativeInTurns(SpeculativeDecoder):
    """Speculative sampling of drafts that take turns."""

    session_class = Turns

    def __init__(self, pair: Pair, turns: Next) -> None:
        super().__init__(pair)
        self.turns = turns


class ThresholdInTurns(ThresholdDecoder):
    """Threshold decoding of drafts that take turns."""

    session_class = ThresholdTurns

    def __init__(self, pair: Pair, turns: Next) -> None:
        super().__init__(pair, LENGTH, "never")
        self.turns = turns


EXACT: dict[str, tuple[Callable[[Pair, Next], Decoder], dict[str, float]]] = {
    "speculative": (SpeculativeInTurns, {}),
    "threshold": (ThresholdInTurns, {"fallback": 0.0, "rollback": 1.0}),
}


def mixed_pair(make_table: MakeTable, vocabulary: int, table: str = "ngram", model: str = "model") -> Pair:
    target = make_table(vocabulary, seed=1, spread=1.2)
    return Pair(target, MixedDraft([make_drafter(kind, make_table, vocabulary) for kind in (table, model)]))


LAWS = [
    ("speculative", "table first", "plain", "suffix", "cascade"),
    ("speculative", "model first", "plain", "suffix", "cascade"),
    ("speculative", "by draws", "plain", "suffix", "cascade"),
    ("speculative", "by draws", "top-p", "ngram", "model"),
    ("threshold", "table first", "plain", "suffix", "model"),
    ("threshold", "model first", "top-k", "ngram", "cascade"),
    ("threshold", "by draws", "top-p", "suffix", "model"),
]
"""Decoder, turns, sampling, and the two drafts."""


@pytest.mark.parametrize(("kind", "turns", "sampling", "table", "model"), LAWS)
def test_drafts_that_take_turns_leave_the_joint_law_as_it_is(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str, turns: str, sampling: str, table: str, model: str
) -> None:
    make, knobs = EXACT[kind]
    pair = mixed_pair(make_table, 3, table, model)
    joint, divergence, _ = walk(monkeypatch, make(pair, TURNS[turns]), SAMPLINGS[sampling], 3, knobs)
    assert distance(joint, exact_joint(pair.target, SAMPLINGS[sampling], PROMPT, 3)) < 1e-5
    assert divergence == 0


def test_a_mixed_pair_by_its_own_rule_leaves_the_joint_law_as_it_is(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    pair = mixed_pair(make_table, 3, "suffix")
    expected = exact_joint(pair.target, Sampling(), PROMPT, 3)
    decoders: list[tuple[Decoder, dict[str, float]]] = [
        (SpeculativeDecoder(pair), {"draft_length": 2}),
        (ThresholdDecoder(pair, 2, "never"), {"fallback": 0.0, "rollback": 1.0}),
    ]
    for decoder, knobs in decoders:
        joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, knobs)
        assert distance(joint, expected) < 1e-5


@pytest.mark.parametrize("turns", TURNS)
def test_the_certificate_holds_for_drafts_that_take_turns(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, turns: str
) -> None:
    pair = mixed_pair(make_table, 3)
    largest = []
    for fallback in (0.1, 0.3, 1.0):
        knobs = {"fallback": fallback, "rollback": 1.0}
        joint, divergence, _ = walk(monkeypatch, ThresholdInTurns(pair, TURNS[turns]), Sampling(), 3, knobs)
        actual, worst = strayed(joint, pair.target, Sampling(), 3)
        assert worst <= fallback + 1e-5
        assert actual <= divergence + 1e-5
        largest.append(worst)
    assert largest[-1] > 0.2  # the bound is not kept by doing nothing


def sampled(decoder: Decoder, texts: int, knobs: Mapping[str, float] | None = None) -> float:
    """P value of the first three tokens of seeded texts."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(texts):
        session = decoder.start(PROMPT, max_new_tokens=3, sampling=Sampling(), seed=seed)
        while not session.finished:
            session.step(knobs)
        counts[tuple(session.tokens)] = counts.get(tuple(session.tokens), 0) + 1
    return p_value_of(counts, exact_joint(decoder.pair.target, Sampling(), PROMPT, 3))


@pytest.mark.parametrize("kind", EXACT)
def test_sampled_texts_of_drafts_that_take_turns_follow_the_target(make_table: MakeTable, kind: str) -> None:
    make, knobs = EXACT[kind]
    assert sampled(make(mixed_pair(make_table, 5, "suffix"), by_what_was_drawn), 400, knobs) > SIGNIFICANCE


class ModelAsCertain(Proposal):
    """A proposal whose model's tokens are tested as if they had been certain."""

    @classmethod
    def of(cls, steps: Sequence[DraftStep], device: torch.device) -> Proposal:
        """Leave out what they were drawn from."""
        return Proposal(super().of(steps, device).tokens)


def test_a_drawn_token_may_be_tested_as_a_certain_one_but_is_kept_less_often(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    decoder = SpeculativeInTurns(mixed_pair(make_table, 3), model_first)
    expected = exact_joint(decoder.pair.target, Sampling(), PROMPT, 3)

    def accepted() -> int:
        texts = (decoder.generate(PROMPT, max_new_tokens=12, sampling=Sampling(), seed=seed) for seed in range(40))
        return sum(round_.accepted for text in texts for round_ in text.rounds)

    before = accepted()
    monkeypatch.setattr(chain_session, "Proposal", ModelAsCertain)
    assert distance(walk(monkeypatch, decoder, Sampling(), 3)[0], expected) < 1e-5
    assert accepted() < before


class TableAsDrawn(Proposal):
    """A proposal whose certain tokens are tested as if the model had drawn them."""

    @classmethod
    def of(cls, steps: Sequence[DraftStep], device: torch.device) -> Proposal:
        """Take the model's distribution for all tokens."""
        proposal = super().of(steps, device)
        drawn = [step.probabilities for step in steps if step.probabilities is not None]
        if proposal.probabilities is None or not drawn:
            return proposal
        return Proposal(proposal.tokens, proposal.logits, drawn[0].expand(len(steps), -1))


class OwedAsCertain(Turns):
    """The model's tokens are tested by what they were drawn from, and what a rejected one leaves as if it were sure."""

    def _successor(self, p: Tensor, proposal: Proposal, kept: Tensor) -> Tensor:
        return super()._successor(p, Proposal(proposal.tokens), kept)


class DroppedWhenUnlikely(Turns):
    """The table takes over from the model, and puts its token in the place of one that the model was unsure of."""

    def draft_one(self, draft: int | None = None) -> Any:
        """Draft, and drop what is unlikely."""
        features = super().draft_one(draft)
        if features is not None and draft == MODEL and self._drafted[-1].drawn_probability() < 0.5:
            self._drafted.pop()
            self._steps = None
            features = super().draft_one(TABLE)
        return features


@pytest.mark.parametrize("wrong", [TableAsDrawn, OwedAsCertain, DroppedWhenUnlikely])
def test_wrong_combinations_are_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, wrong: type[Any]
) -> None:
    if issubclass(wrong, Proposal):
        monkeypatch.setattr(chain_session, "Proposal", wrong)
    else:
        monkeypatch.setattr(SpeculativeInTurns, "session_class", wrong)
    decoder = SpeculativeInTurns(mixed_pair(make_table, 3), model_first)
    joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3)
    assert distance(joint, exact_joint(decoder.pair.target, Sampling(), PROMPT, 3)) > 0.01
    if wrong is DroppedWhenUnlikely:  # the one that no look at a single row shows
        assert sampled(SpeculativeInTurns(mixed_pair(make_table, 5), model_first), 1_400) < SIGNIFICANCE / 1000


@pytest.mark.parametrize("turns", TURNS)
def test_greedy_texts_of_drafts_that_take_turns_are_those_of_plain_decoding(
    make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel], turns: str
) -> None:
    model = make_model("llama")
    noisy = ModelDrafter(Pair(model, make_noisy(model, 0.02)).draft.model)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (9,), generator=generator).tolist() for _ in range(2)]
    plain = AutoregressiveDecoder(Pair(model))
    expected = [plain.generate(prompt, max_new_tokens=32).tokens for prompt in prompts]
    seen = [[*prompt, *text[::3], *text] for prompt, text in zip(prompts, expected, strict=True)]
    table = NGramDrafter.fit(seen, 96, order=3)
    kept: set[tuple[str, int]] = set()
    for first, second in (
        (table, noisy),
        (SuffixDrafter(96, memory=200), CascadeDrafter(noisy, table)),
        (PromptLookupDrafter(96), noisy),
    ):
        pair = Pair(model, MixedDraft([first, second]))
        for make, knobs in EXACT.values():
            for prompt, text in zip(prompts, expected, strict=True):
                generation = make(pair, TURNS[turns]).generate(prompt, max_new_tokens=32, knobs=knobs)
                assert generation.tokens == text
                kept.update((pair.name, round_.accepted) for round_ in generation.rounds)
    assert len({accepted for _, accepted in kept}) > 2
