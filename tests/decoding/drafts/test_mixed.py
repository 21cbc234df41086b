"""Several drafts of one target: proposals that mix them, hand-over in the middle of a draft, catching up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from specgym.decoding import (
    GREEDY,
    ArgumentError,
    AutoregressiveDecoder,
    MixedDraft,
    ModelStep,
    NGramDrafter,
    OneHotStep,
    Pair,
    PromptLookupDrafter,
    Proposal,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
    VocabularyMismatchError,
    load_pair,
    memory_of,
    resolve,
)

CPU = torch.device("cpu")
PROMPT = "And it came to pass that the king said unto the people, and the people said unto the king"


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The shipped target with two models, a table and copying."""
    return load_pair("tiny-10m-mixed")


def plain(pair: Pair, tokens: int) -> Sequence[int]:
    return AutoregressiveDecoder(pair).generate(PROMPT, max_new_tokens=tokens).tokens


def test_one_hot_tokens_beside_a_models_have_one_hot_rows() -> None:
    logits = torch.tensor([[0.5, 1.0, -1.0]])
    model = ModelStep(torch.tensor([1]), logits, logits.softmax(-1))
    proposal = Proposal.of([OneHotStep(2), model, OneHotStep(0)], CPU)
    assert proposal.tokens.tolist() == [2, 1, 0]
    assert proposal.probabilities is not None
    assert proposal.logits is not None
    expected = torch.stack([torch.tensor([0.0, 0, 1]), logits.softmax(-1)[0], torch.tensor([1.0, 0, 0])])
    torch.testing.assert_close(proposal.probabilities, expected)
    torch.testing.assert_close(proposal.logits.softmax(-1), expected)


def test_greedy_proposals_that_mix_kinds_have_no_probabilities() -> None:
    proposal = Proposal.of([ModelStep(torch.tensor([1]), torch.zeros(1, 3)), OneHotStep(2)], CPU)
    assert proposal.probabilities is None
    assert proposal.logits is not None
    assert proposal.logits.shape == (2, 3)


def test_probability_of_the_drawn_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    drawn = ModelStep(torch.tensor([2]), logits, logits.softmax(-1))
    assert drawn.drawn_probability() == pytest.approx(float(logits.softmax(-1)[0, 2]))
    likeliest = ModelStep(torch.tensor([1]), logits)
    assert likeliest.drawn_probability() == likeliest.confidence()
    assert OneHotStep(3, 0.5).drawn_probability() == 1.0


def test_look_ups_say_how_many_tokens_they_matched() -> None:
    table = NGramDrafter.fit([[1, 2, 3, 4]], 8, order=4)
    assert [step.matched for step in table.steps([7, 2], 2)] == [1, 2]
    session = PromptLookupDrafter(8).start([], GREEDY, torch.Generator(), CPU)
    assert [step.matched for step in session.steps([1, 2, 3, 5, 1, 2], 1)] == [2]


@pytest.mark.parametrize("decoder", [SpeculativeDecoder, ThresholdDecoder])
def test_greedy_text_of_the_fixed_rule_is_the_targets(pair: Pair, decoder: type) -> None:
    decoding = SpeculativeDecoder(pair) if decoder is SpeculativeDecoder else ThresholdDecoder(pair, stop="never")
    knobs = {} if decoder is SpeculativeDecoder else {"fallback": 0.0}
    generation = decoding.generate(PROMPT, max_new_tokens=40, knobs=knobs)
    assert generation.tokens == plain(pair, 40)
    assert generation.mean_acceptance_length > 1


def test_hand_over_in_the_middle_of_drafts_keeps_the_targets_text(pair: Pair) -> None:
    session = SpeculativeDecoder(pair).start(PROMPT, max_new_tokens=40)
    turn, handed_over = 0, 0
    while not session.finished:
        drafts = [(turn + place) % 4 for place in range(1 + turn % 5)]
        drafted = [session.draft_one(draft) is not None for draft in drafts]
        handed_over += sum(drafted) > 1
        session.verify()
        turn += 1
    assert session.tokens == plain(pair, 40)
    assert handed_over > 3


def test_of_several_look_ups_the_longest_match_proposes() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    table = NGramDrafter.fit([[2, 3, 6], [3, 6]], 8, order=3)  # knows what follows 2, 3
    drafts = MixedDraft([table, PromptLookupDrafter(8), PromptLookupDrafter(8, longest=1)])
    session = drafts.start(text, GREEDY, torch.Generator(), CPU)
    assert [(int(step.token), step.matched) for step in session.steps(text, 2)] == [(4, 3), (5, 3)]
    other = drafts.start([3, 7, 2, 3], GREEDY, torch.Generator(), CPU)
    assert next(other.steps([3, 7, 2, 3], 1)).token == 6  # of these the table has seen two, the text one


def test_a_model_that_was_not_asked_reads_what_it_missed(pair: Pair) -> None:
    decoder = SpeculativeDecoder(pair)
    late = decoder.start(PROMPT, max_new_tokens=24)
    while len(late.tokens) < 9:
        late.draft_one(3)
        late.verify()
    begun = decoder.start([*late.context], max_new_tokens=8)
    features, expected = late.draft_one(1), begun.draft_one(1)
    assert features is not None
    assert expected is not None
    assert features[0] == pytest.approx(expected[0], abs=1e-5)  # as confident as one that has read all along
    assert late.verify().tokens == begun.verify().tokens


def test_sampled_rounds_mix_one_hot_and_drawn_tokens(pair: Pair) -> None:
    session = SpeculativeDecoder(pair).start(PROMPT, max_new_tokens=16, sampling=Sampling(temperature=1.0), seed=3)
    while not session.finished:
        for draft in (2, 0, 2):
            session.draft_one(draft)
        assert session.verify().tokens


def test_names_of_mixed_pairs() -> None:
    assert resolve("tiny-10m+tiny-10m-draft-1l,prompt-lookup").drafts == ("tiny-10m-draft-1l", "prompt-lookup")
    pair = load_pair("tiny-3m+tiny-3m-draft-1l,prompt-lookup")
    assert isinstance(pair.draft, MixedDraft)
    assert [draft.name for draft in pair.draft.drafts] == ["tiny-3m-draft-1l", "prompt-lookup"]
    single, both = memory_of(load_pair("tiny-10m-2l")), memory_of(load_pair("tiny-10m-mixed"))
    assert both.per_token > single.per_token
    assert both.draft > single.draft


def test_drafts_that_cannot_be_mixed_are_refused(pair: Pair) -> None:
    lookup = PromptLookupDrafter(8)
    with pytest.raises(ArgumentError, match="two or more"):
        MixedDraft([lookup])
    with pytest.raises(VocabularyMismatchError, match="vocabulary of 8 tokens and draft prompt-lookup one of 9"):
        MixedDraft([lookup, PromptLookupDrafter(9)])
    with pytest.raises(ArgumentError, match="several"):
        ThresholdDecoder(pair)
    with pytest.raises(ArgumentError, match="has one draft"):
        SpeculativeDecoder(load_pair("tiny")).start(PROMPT, max_new_tokens=4).draft_one(0)
