"""Decoding with a head: texts are the target's, greedy and sampled, alone and beside other drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from specgym.decoding import (
    AutoregressiveDecoder,
    ConfidenceBelow,
    DraftTreeDecoder,
    EagleDrafter,
    LanguageModel,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
    TokenTree,
    draft_digest,
    memory_of,
)
from specgym.decoding.drafts.drafter import ModelStep, beside
from specgym.decoding.drafts.eagle.passes import HeadPasses
from specgym.decoding.drafts.eagle.target import StatesTarget
from specgym.decoding.drafts.eagle.tree import HeadInTrees
from specgym.decoding.errors import ArgumentError
from specgym.decoding.models.captured import NEVER
from specgym.decoding.models.early_exit import EarlyExit
from tests.helpers.first_tokens import assert_texts_follow_the_target
from tests.helpers.known_distributions import PROMPT, distance, exact_joint, walk
from tests.helpers.small_eagle_heads import small_head

MakeModel = Callable[..., PreTrainedModel]
TEXT = [5, 17, 80, 3, 44, 9, 9, 61, 2, 30, 71, 12]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama", layers=4, spread=0.15)


def table() -> NGramDrafter:
    """A table whose tokens are often wrong."""
    text = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    return NGramDrafter.fit([text], 96, order=2)


@pytest.fixture
def informed(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let heads know every second token, so that some of what they draft is right."""
    expected = AutoregressiveDecoder(Pair(model)).generate(TEXT, max_new_tokens=60).tokens
    passes = HeadPasses._run

    def run(self: HeadPasses, alone: bool, tokens: Any, read: Any, start: int, cache: Any) -> Any:
        hidden, scores = passes(self, alone, tokens, read, start, cache)
        place = start + len(tokens) + 1 - len(TEXT)
        if 0 <= place < len(expected) and place % 4:
            scores = scores.clone()
            scores[:, expected[place]] += 100.0
        return hidden, scores

    monkeypatch.setattr(HeadPasses, "_run", run)


@pytest.mark.parametrize("others", [[], [PromptLookupDrafter(96, longest=2)], [EarlyExit(1)]])
@pytest.mark.usefixtures("informed")
def test_greedy_texts_are_those_of_generate(
    model: PreTrainedModel, reference: Callable[..., list[list[int]]], others: list[Any]
) -> None:
    pair = Pair(model, [small_head(model), *others])
    expected = reference(model, [TEXT], 40)[0]
    for decoder, knobs in (
        (SpeculativeDecoder(pair), {"draft_length": 2}),
        (SpeculativeDecoder(pair), {"draft_length": 5}),
        (ThresholdDecoder(pair, 4, "never"), {"fallback": 0.0, "rollback": 3.0}),
        (SpeculativeDecoder(pair, stop=ConfidenceBelow(0.05)), {}),
    ):
        generation = decoder.generate(TEXT, max_new_tokens=40, knobs=knobs)
        assert generation.tokens == expected
        assert sum(round_.accepted for round_ in generation.rounds) > (2 if others else 10)
    assert SpeculativeDecoder(pair).generate(TEXT[:1], max_new_tokens=9).tokens == reference(model, [TEXT[:1]], 9)[0]


def test_a_draft_handed_over_from_one_draft_to_another_is_verified_all_the_same(
    model: PreTrainedModel, reference: Callable[..., list[list[int]]]
) -> None:
    pair = Pair(model, [small_head(model), table()])
    orders: tuple[tuple[int, ...], ...] = ((0, 0, 1, 0), (1, 0), (0, 1), (1, 1), ())
    session = SpeculativeDecoder(pair).start(TEXT, max_new_tokens=48)
    for turn in range(48):
        for draft in orders[turn % len(orders)]:
            session.draft_one(draft)
        session.verify()
    assert session.tokens == reference(model, [TEXT], 48)[0]


def test_logits_processors_leave_texts_those_of_plain_decoding(model: PreTrainedModel) -> None:
    pair = Pair(model, small_head(model))
    more: dict[str, Any] = {"max_new_tokens": 24, "logits_processor": [RepetitionPenaltyLogitsProcessor(1.6)]}
    plain = AutoregressiveDecoder(pair.without_draft()).generate(TEXT, **more)
    assert SpeculativeDecoder(pair).generate(TEXT, knobs={"draft_length": 3}, **more).tokens == plain.tokens
    assert not isinstance(pair.without_draft().target, StatesTarget)


def test_samples_follow_the_target_and_a_wrong_probability_is_found_out(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", vocabulary=3, hidden=16, spread=0.4)
    pair = Pair(model, small_head(model, spread=3.0, vocabulary=(0, 2)))
    expected = exact_joint(pair.target, Sampling(), PROMPT, 2)
    joint, _, _ = walk(monkeypatch, SpeculativeDecoder(pair), Sampling(), 2, {"draft_length": 2})
    assert distance(joint, expected) < 1e-5
    init = ModelStep.__init__
    monkeypatch.setattr(  # as if the head had drawn from another distribution than it says
        ModelStep, "__init__", lambda self, token, logits, q: init(self, token, logits, q.roll(1, -1))
    )
    joint, _, _ = walk(monkeypatch, SpeculativeDecoder(pair), Sampling(), 2, {"draft_length": 2})
    assert distance(joint, expected) > 1e-3


def test_sampled_texts_follow_the_target(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=3, hidden=16, spread=0.4)
    pair = Pair(model, small_head(model, spread=3.0))
    assert_texts_follow_the_target(SpeculativeDecoder(pair), Sampling(), 120, lambda number: {"draft_length": 2.0})


def test_captured_passes_give_the_numbers_of_the_head(model: PreTrainedModel) -> None:
    pair = Pair(model, small_head(model))
    texts = []
    assert isinstance(pair.draft, EagleDrafter)
    for _ in range(3):
        texts.append(SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=30, sampling=Sampling(), seed=1).tokens)
    assert pair.draft.passes._graphs
    assert texts[0] == texts[1] == texts[2]
    before = [round_.taken_back for round_ in SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=12).rounds]
    with torch.no_grad():
        pair.draft.head.midlayer.mlp.up_proj.weight.mul_(-3.0)
    after = [round_.taken_back for round_ in SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=12).rounds]
    plain = Pair(model, pair.draft.head, prepack=False)
    assert (
        before
        != after
        == [round_.taken_back for round_ in SpeculativeDecoder(plain).generate(TEXT, max_new_tokens=12).rounds]
    )


def test_a_head_is_captured_while_warming_up_and_then_no_more(model: PreTrainedModel) -> None:
    pair = Pair(model, small_head(model))
    assert isinstance(pair.draft, EagleDrafter)
    passes, usual = pair.draft.passes, pair.draft.passes.patience
    with pair.capturing(after=NEVER):
        SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=24)
    assert not passes._graphs
    with pair.capturing(after=1):
        SpeculativeDecoder(pair).generate(TEXT, max_new_tokens=8)
    assert passes._graphs
    assert passes.patience == usual


def test_packing_changes_no_proposal_and_can_be_undone(model: PreTrainedModel) -> None:
    head = small_head(model, vocabulary=range(64))
    plain = Pair(model, head, prepack=False)
    digest = draft_digest(plain.draft)  # type: ignore[arg-type]
    expected = SpeculativeDecoder(plain).generate(TEXT, max_new_tokens=20)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.half().float())
    assert draft_digest(plain.draft) != digest  # type: ignore[arg-type]
    packed = Pair(model, head)
    assert SpeculativeDecoder(packed).generate(TEXT, max_new_tokens=20).tokens == expected.tokens
    packed.unpack()
    assert memory_of(packed).draft >= sum(parameter.nbytes for parameter in head.parameters())
    assert SpeculativeDecoder(packed).generate(TEXT, max_new_tokens=20).tokens == expected.tokens


def test_one_text_has_heads_that_read_the_same_layers(model: PreTrainedModel, make_model: MakeModel) -> None:
    same = Pair(model, [small_head(model), small_head(model, seed=1)])
    plain = AutoregressiveDecoder(Pair(model)).generate(TEXT, max_new_tokens=12).tokens
    assert SpeculativeDecoder(same).generate(TEXT, max_new_tokens=12).tokens == plain
    with pytest.raises(ArgumentError, match="cannot draft in one text"):
        Pair(model, [small_head(model), small_head(model, layers=(0, 1))])
    # A head that serves one model is copied for another.
    head, twin = small_head(model), make_model("llama", layers=4, spread=0.15)
    pairs = [Pair(model, head), Pair(twin, head)]
    assert isinstance(pairs[1].draft, EagleDrafter)
    assert head.model is model
    assert pairs[1].draft.head.model is twin


@pytest.mark.parametrize("rule", ["likeliest", "independent", "distinct"])
def test_trees_of_a_head_leave_texts_those_of_generate(
    model: PreTrainedModel, reference: Callable[..., list[list[int]]], rule: str
) -> None:
    pair = Pair(model, small_head(model, vocabulary=range(0, 96, 3)))
    decoder = DraftTreeDecoder(pair, rule, pruning=None)
    for prompt in (TEXT, TEXT[:1]):
        generation = decoder.generate(prompt, max_new_tokens=24, seed=0, knobs={"max_candidates": 4, "max_depth": 3})
        assert generation.tokens == reference(model, [prompt], 24)[0]
    assert sum(round_.accepted for round_ in generation.rounds) > 0
    more: dict[str, Any] = {"max_new_tokens": 16, "logits_processor": [RepetitionPenaltyLogitsProcessor(1.6)]}
    plain = AutoregressiveDecoder(pair.without_draft()).generate(TEXT, **more)
    assert decoder.generate(TEXT, seed=0, **more).tokens == plain.tokens


def test_a_tree_is_read_as_its_branches_would_be(model: PreTrainedModel) -> None:
    pair = Pair(model, small_head(model, spread=2.0), prepack=False)
    target = pair.target.fresh()
    target.read(TEXT[:-1])
    assert isinstance(pair.draft, EagleDrafter)
    head = HeadInTrees(pair.draft).within(target)
    head.read(TEXT[:-1])
    for _ in range(3):
        assert head.length == len(TEXT) - 1
        scores = [head.forward(torch.tensor(TEXT[-1:]), last=1).scores]
        nodes, parents = [7, 8, 9, 10, 11, 12], [-1, -1, 1, 0, 1, 3]
        for start, end in ((0, 2), (2, 5), (5, 6)):
            scores.append(head.forward(torch.tensor(nodes[start:end]), TokenTree(parents[:end])).scores)
        rows = torch.cat(scores)
        session: Any = beside(pair.draft, target).start(TEXT, Sampling(0.0), torch.Generator(), torch.device("cpu"))
        for node, path in enumerate(([], [7], [8], [8, 9], [7, 10], [8, 11], [7, 10, 12])):
            torch.testing.assert_close(rows[node], session._catch_up([*TEXT, *path])[0], rtol=1e-3, atol=1e-3)
        head.keep([1, 2])
        head.truncate(len(TEXT) - 1)


def test_samples_from_trees_follow_the_target(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=3, hidden=16, spread=0.4)
    pair = Pair(model, small_head(model, spread=3.0))
    decoder = DraftTreeDecoder(pair, "distinct", pruning=None)
    knobs = {"max_candidates": 2.0, "max_depth": 2.0, "node_budget": 4.0}
    assert_texts_follow_the_target(decoder, Sampling(), 100, lambda number: knobs)


def test_a_target_that_is_no_plain_model_may_still_be_named(model: PreTrainedModel) -> None:
    target = StatesTarget(LanguageModel(model, prepack=False), (0, 1))
    pair = Pair(target, small_head(model), prepack=False)
    assert isinstance(pair.target, StatesTarget)
    assert pair.target.layers == (0, 2, 3)[: len(pair.target.layers)] or pair.target.layers == (2, 3)
