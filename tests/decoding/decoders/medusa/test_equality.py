"""Greedy Medusa decoding gives, token for token, what `transformers` generates, whatever the tree and the heads."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoder import Decoder, Session
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, MedusaRound, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.trees import CandidateTree, cartesian
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.linear_layers import PrepackedLinear
from specgym.decoding.rounds import Round
from tests.helpers.small_medusa_heads import random_heads, taught_heads

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
Knobs = Callable[[int], Mapping[str, float]]
"""Knobs of a round by its number."""

NEW = 24
TREES = {
    "wide": cartesian([8, 4]),
    "deep": cartesian([2, 2, 2, 2]),
    "chain": cartesian([1, 1, 1, 1]),
    "one level": cartesian([12]),
    "ragged": CandidateTree([(0,), (3,), (3, 0), (3, 5), (3, 5, 1), (1,), (3, 5, 1, 0)]),
    "none": CandidateTree([]),
}
SIZES = [(4, 1), (4, 4), (4, 16), (2, 8), (1, 5), (4, 64), (0, 16), (4, 0), (0, 0)]


def of_size(heads: int, tree_size: int) -> Knobs:
    """Equal knobs in every round."""
    return lambda number: {"heads": heads, "tree_size": tree_size}


def changing(seed: int) -> Knobs:
    """Other knobs in every round, from the whole of their ranges."""
    rng = random.Random(seed)
    return lambda number: {"heads": rng.randint(0, 4), "tree_size": rng.choice((0, 1, 3, 9, 27, 64))}


def nothing(number: int) -> Mapping[str, float]:
    return {}


def decode(decoder: Decoder, prompt: Sequence[int], new: int, knobs: Knobs) -> tuple[Session, list[Round]]:
    """A finished session and its rounds."""
    session = decoder.start(prompt, max_new_tokens=new, seed=0)
    rounds: list[Round] = []
    while not session.finished:
        rounds.append(session.step(knobs(len(rounds))))
        assert session.target.length == len(session.context) - 1
    assert [token for round_ in rounds for token in round_.tokens] == session.tokens
    for round_ in rounds:
        assert isinstance(round_, MedusaRound)
        assert 0 <= round_.accepted <= min(round_.drafted, round_.heads)
        assert round_.target_tokens == round_.drafted + 1
        assert round_.draft_steps == round_.heads
        assert round_.divergence == 0
    return session, rounds


class Tally:
    """Counts of what was verified, so that a test shows that both outcomes came up."""

    def __init__(self) -> None:
        self.accepted = self.rejected = 0
        self.lengths: set[int] = set()

    def add(self, rounds: Sequence[Round]) -> None:
        self.accepted += sum(round_.accepted for round_ in rounds)
        self.rejected += sum(round_.drafted - round_.accepted for round_ in rounds)
        self.lengths |= {round_.accepted for round_ in rounds}


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of one token, five, nine and thirteen."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, vocabulary, (1 + 4 * (number % 4),), generator=generator).tolist() for number in range(count)
    ]


def joined(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize(("family", "vocabulary"), [("llama", 96), ("opt", 96), ("gpt2", 12), ("qwen2", 12)])
def test_greedy_output_on_random_models_equals_generate(
    make_model: MakeModel,
    reference: Reference,
    family: str,
    vocabulary: int,
) -> None:
    model = make_model(family, vocabulary=vocabulary)
    prompts = random_prompts(16, vocabulary)
    expected = reference(model, prompts, NEW)
    texts = joined(prompts[1::2], expected[1::2])
    some = range(0, vocabulary, 2) if vocabulary > 12 else (*range(8), 10)
    heads = [
        taught_heads(model, texts),
        random_heads(model),
        taught_heads(model, texts, own_output=True),
        taught_heads(model, texts, blocks=2),
        taught_heads(model, texts, blocks=0, own_output=True, vocabulary=some),
        random_heads(model, blocks=0),  # all that the target itself would say next
        taught_heads(model, texts, vocabulary=some),
    ]
    pair = Pair(model)
    cases: list[tuple[Decoder, Knobs]] = []
    for number, size in enumerate(SIZES):
        cases += [(MedusaDecoder(pair, heads[number % 2 and vocabulary // 96]), of_size(*size))]
    for tree in TREES.values():
        cases += [(MedusaDecoder(pair, item, tree=tree), nothing) for item in heads[: 1 + vocabulary // 96]]
    for number, item in enumerate(heads):
        # At temperature 0 the lossy decoder is no other.
        cases += [((MedusaDecoder, TypicalMedusaDecoder)[number % 2](pair, item), changing(number))]
    heads[2].accuracies = ((0.1, 0.2, 0.7), (0.0, 0.6), (0.5,), (0.5, 0.5))  # trees by measured ones, in any order
    cases += [(MedusaDecoder(pair, heads[2]), of_size(4, 16)), (MedusaDecoder(pair, heads[2]), changing(9))]
    tally = Tally()
    for number, (decoder, knobs) in enumerate(cases):
        place = (number + number // 16) % 16  # of all lengths in turn
        session, rounds = decode(decoder, prompts[place], NEW, knobs)
        assert session.tokens == expected[place], number
        assert session.finish_reason == "length"
        tally.add(rounds)
    assert min(tally.accepted, tally.rejected) > 100, vars(tally)
    assert tally.lengths == set(range(5)), vars(tally)


def test_the_first_round_after_a_prompt_of_one_token_drafts_nothing(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=12)
    for decoder in (
        MedusaDecoder(Pair(model), random_heads(model)),
        MedusaDecoder(Pair(model), random_heads(model), tree=TREES["deep"]),
    ):
        session = decoder.start([3], max_new_tokens=20)
        rounds = [session.step(), session.step()]
        # There is no hidden state yet that heads could read.
        assert [round_.drafted for round_ in rounds] == [0, 16 if decoder.knobs else 30]


def test_texts_of_one_to_three_tokens_equal_generate(make_model: MakeModel, reference: Reference) -> None:
    model = make_model("qwen2", vocabulary=12)
    prompts = [[3], [4, 1, 4, 1, 4, 1], [0, 0, 0, 0, 0]]
    heads = taught_heads(model, joined(prompts, reference(model, prompts, NEW)))
    pair = Pair(model)
    accepted = 0
    for new in (1, 2, 3):
        for prompt, tokens in zip(prompts, reference(model, prompts, new), strict=True):
            cases: list[tuple[Decoder, Knobs]] = [
                (MedusaDecoder(pair, heads, tree=tree), nothing) for tree in TREES.values()
            ]
            cases += [(MedusaDecoder(pair, heads), of_size(*size)) for size in SIZES]
            for decoder, knobs in cases:
                session, rounds = decode(decoder, prompt, new, knobs)
                assert session.tokens == tokens
                # No deeper than there is room for.
                assert all(isinstance(round_, MedusaRound) and round_.heads < new for round_ in rounds)
                accepted += sum(round_.accepted for round_ in rounds)
    assert accepted > 10


@pytest.mark.parametrize(("family", "vocabulary"), [("llama", 96), ("gpt2", 12)])
def test_a_text_that_ends_at_the_context_limit_equals_generate(
    make_model: MakeModel, reference: Reference, family: str, vocabulary: int
) -> None:
    model = make_model(family, vocabulary=vocabulary, context=40)
    pair = Pair(model)
    prompts = [[1, 2] * 10, [2, 5, 2] * 10, list(range(12)) * 3, [4] * 38, [5] * 39]
    expected = [reference(model, [prompt], 40 - len(prompt))[0] for prompt in prompts]
    heads = taught_heads(model, joined(prompts, expected))
    filled = 0
    for prompt, tokens in zip(prompts, expected, strict=True):
        cases: list[tuple[Decoder, Knobs]] = [
            (MedusaDecoder(pair, heads, tree=tree), nothing) for tree in TREES.values()
        ]
        cases += [(MedusaDecoder(pair, heads), of_size(*size)) for size in SIZES[:6]]
        cases += [(MedusaDecoder(pair, heads), changing(seed)) for seed in range(4)]
        for decoder, knobs in cases:
            session, rounds = decode(decoder, prompt, 99, knobs)
            assert session.tokens == tokens
            assert session.finish_reason == "context"
            filled += rounds[-1].accepted
    assert filled > 10  # by candidates, up to the last place that is not the target's own


def test_a_text_that_ends_within_an_accepted_path_ends_where_generate_ends_it(
    make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("opt", vocabulary=12)
    prompts = random_prompts(8, 12)
    heads = taught_heads(model, joined(prompts, reference(model, prompts, NEW)))
    within = ended = 0
    for end in (0, 5, 9):
        model.generation_config.eos_token_id = [end, (end + 1) % 12]
        pair = Pair(model)
        assert pair.eos_token_ids == {end, (end + 1) % 12}
        # Prompts hold such tokens, and may end in one.
        options = [*prompts, [end], [3, end, 4, end], [end, 5, end, 5, end, 5]]
        decoders = [MedusaDecoder(pair, heads), *(MedusaDecoder(pair, heads, tree=tree) for tree in TREES.values())]
        for number, (prompt, tokens) in enumerate(zip(options, reference(model, options, NEW), strict=True)):
            for decoder, knobs in ((decoders[0], changing(number)), (decoders[1 + number % len(TREES)], nothing)):
                session, rounds = decode(decoder, prompt, NEW, knobs)
                assert session.tokens == tokens
                assert session.finish_reason == ("eos" if tokens[-1] in pair.eos_token_ids else "length")
                ended += session.finish_reason == "eos"
                # Its last token was a candidate, so that the path, or the target's own token, went on behind it.
                within += rounds[-1].accepted == len(rounds[-1].tokens)
    model.generation_config.eos_token_id = None
    assert ended > 20
    assert within > 10


@pytest.mark.parametrize(
    ("own_output", "vocabulary"),
    [(False, ()), (False, tuple(range(0, 2**14, 3))), (True, tuple(range(0, 2**14, 3)))],
    ids=["all tokens", "a third", "a third, own output"],
)
def test_a_prepacked_target_gives_what_generate_gives(
    make_model: MakeModel,
    reference: Reference,
    own_output: bool,
    vocabulary: tuple[int, ...],
) -> None:
    model = make_model("llama", vocabulary=2**14, layers=1)
    prompts = [[1, 2, 3], [4000, 5, 16_000]]
    expected = reference(model, prompts, 24)
    heads = taught_heads(
        model, joined(prompts, expected), heads=2, steps=12, own_output=own_output, vocabulary=vocabulary
    )
    pair = Pair(LanguageModel(model, prepack=True))
    assert isinstance(model.get_output_embeddings(), PrepackedLinear)
    tally = Tally()
    for prompt, tokens in zip(prompts, expected, strict=True):
        for decoder in (MedusaDecoder(pair, heads), MedusaDecoder(pair, heads, tree=cartesian([6, 3]))):
            session, rounds = decode(decoder, prompt, 24, nothing)
            assert session.tokens == tokens
            tally.add(rounds)
    assert min(tally.accepted, tally.rejected) > 0, vars(tally)
