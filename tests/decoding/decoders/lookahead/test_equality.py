"""Greedy Lookahead and Jacobi decoding give, token for token, what `transformers` generates, whatever the settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoder import Decoder, Session
from specgym.decoding.decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder
from specgym.decoding.decoders.lookahead.pool import PoolSettings
from specgym.decoding.loading.pair import Pair, load_pair
from specgym.decoding.prompts import load_prompts
from specgym.decoding.rounds import Round

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
Knobs = Callable[[int], Mapping[str, float]]
"""Knobs of a round by its number."""

SHAPES = [(1, 2, 0), (16, 6, 16), (5, 3, 5), (15, 5, 15), (1, 6, 16), (16, 2, 1), (4, 4, 0), (3, 4, 2)]
POOLS = {
    "usual": PoolSettings(),
    "unseeded": PoolSettings(seeds="nothing"),
    "prompt": PoolSettings(seeds="prompt", chunk_tokens=9),
    "frequency": PoolSettings(retention="frequency", per_key=2),
    "sliding": PoolSettings(retention="sliding", horizon=12),
    "small": PoolSettings(max_keys=3, per_key=1),
    "top share": PoolSettings(top_share=0.6),
    "overlap": PoolSettings(max_overlap=0.3),
    "two stages": PoolSettings(min_acceptance=0.4),
    "all": PoolSettings(
        seeds="prompt",
        retention="sliding",
        horizon=40,
        max_keys=20,
        per_key=5,
        top_share=0.8,
        max_overlap=0.7,
        min_acceptance=0.2,
        ranking="learned",
        chunk_tokens=7,
    ),
}


def of_shape(shape: tuple[int, int, int]) -> Knobs:
    """Equal knobs in every round."""
    knobs = dict(zip(("window", "ngram", "guesses"), shape, strict=True))
    return lambda number: knobs


def changing(seed: int) -> Knobs:
    """Other knobs in every round, from the whole of their ranges."""
    rng = random.Random(seed)
    return lambda number: {
        "window": rng.randint(1, 16),
        "ngram": rng.randint(2, 6),
        "guesses": rng.choice((0, 1, 4, 16)),
    }


def decode(decoder: Decoder, prompt: Sequence[int], new: int, knobs: Knobs, seed: int = 0) -> tuple[Session, list]:
    """A finished session and its rounds."""
    session = decoder.start(prompt, max_new_tokens=new, seed=seed)
    rounds: list[Round] = []
    while not session.finished:
        rounds.append(session.step(knobs(len(rounds))))
    assert [token for round_ in rounds for token in round_.tokens] == session.tokens
    assert all(0 <= round_.accepted <= round_.drafted < round_.target_tokens for round_ in rounds)
    return session, rounds


class Tally:
    """Counts of what was verified, so that a test shows that both outcomes came up."""

    def __init__(self) -> None:
        self.accepted = self.rejected = 0

    def add(self, rounds: Sequence[Round]) -> None:
        self.accepted += sum(round_.accepted for round_ in rounds)
        self.rejected += sum(round_.drafted - round_.accepted for round_ in rounds)


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, vocabulary, (1 + 4 * (number % 4),), generator=generator).tolist() for number in range(count)
    ]


@pytest.mark.parametrize(
    ("family", "vocabulary", "first", "step"),
    [("llama", 12, 0, 1), ("llama", 96, 0, 1), ("opt", 96, 0, 4), ("gpt2", 12, 1, 4), ("qwen2", 96, 2, 4)],
)
def test_greedy_output_on_random_models_equals_generate(
    make_model: MakeModel, reference: Reference, family: str, vocabulary: int, first: int, step: int
) -> None:
    """Every case on the first family; on the others every fourth."""
    model = make_model(family, vocabulary=vocabulary)
    prompts = random_prompts(36, vocabulary)
    expected = reference(model, prompts, 40)
    pair = Pair(model)
    cases: list[tuple[Decoder, Knobs]] = [(LookaheadDecoder(pair), of_shape(shape)) for shape in SHAPES]
    cases += [(LookaheadDecoder(pair, pool=pool), of_shape((6, 4, 4))) for pool in POOLS.values()]
    cases += [(LookaheadDecoder(pair, pool=pool), changing(seed)) for seed, pool in enumerate(POOLS.values())]
    cases += [
        (JacobiDecoder(pair), lambda number: {}),
        (JacobiDecoder(pair), lambda number: {"window": 1 + number % 16}),
    ]
    tally = Tally()
    for number, (decoder, knobs) in list(enumerate(cases))[first::step]:
        for place in (number, number + 3):  # of two lengths
            session, rounds = decode(decoder, prompts[place % 36], 40, knobs, seed=number)
            assert session.tokens == expected[place % 36], (number, place)
            assert session.finish_reason == "length"
            tally.add(rounds)
    assert min(tally.accepted, tally.rejected) > 100 / step, vars(tally)


@pytest.mark.parametrize("name", ["tiny-10m", "tiny-3m"])
def test_greedy_output_of_shipped_targets_equals_generate(name: str, reference: Reference) -> None:
    pair = load_pair(name)
    assert pair.draft is None
    texts = [text for group in ("prose", "code", "definitions", "chat") for text in load_prompts(group).train[:2]]
    prompts = [pair.encode(text)[:48] for text in texts]
    expected = reference(pair.target.model, prompts, 40)
    pools = list(POOLS.values())
    tally = Tally()
    for number, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True)):
        if number % 6 == 5:
            decoder: Decoder = JacobiDecoder(pair)
            knobs: Knobs = lambda number: {}  # noqa: E731
        else:
            decoder = LookaheadDecoder(pair, pool=pools[number % len(pools)])
            knobs = (lambda number: {}, of_shape(SHAPES[number % len(SHAPES)]), changing(number))[number % 3]
        session, rounds = decode(decoder, prompt, 40, knobs, seed=number)
        assert session.tokens == tokens, (number, decoder.name)
        tally.add(rounds)
    assert min(tally.accepted, tally.rejected) > 30, vars(tally)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_a_text_that_ends_at_the_context_limit_equals_generate(
    make_model: MakeModel, reference: Reference, family: str, seed: int
) -> None:
    model = make_model(family, vocabulary=(12, 96)[seed % 2], context=40)
    pair = Pair(model)
    prompts = [[1], [2, 5, 2, 5, 2, 5], list(range(12)) * 3]
    for prompt in prompts:
        expected = reference(model, [prompt], 40 - len(prompt))[0]
        knobs = [of_shape(SHAPES[seed]), of_shape(SHAPES[seed + 4]), *(changing(100 * seed + n) for n in range(6))]
        for item in knobs:
            session, _ = decode(LookaheadDecoder(pair), prompt, 99, item, seed=seed)
            assert session.tokens == expected
            assert session.finish_reason == "context"


def test_the_current_token_is_read_after_rounds_without_room_for_the_window(
    make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("llama", vocabulary=96, context=24)
    decoder = LookaheadDecoder(Pair(model))
    # Five rows do not fit before the end of the context any more; when they are one row again, it must begin anew.
    high, low = of_shape((4, 6, 0))(0), of_shape((4, 2, 0))(0)
    without = different = 0
    for first in range(0, 80, 10):
        prompt = list(range(first, first + 10))
        expected = reference(model, [prompt], 14)[0]
        for turn in (11, 12, 13):
            knobs: Knobs = lambda number, turn=turn: low if number >= turn else high  # type: ignore[misc]  # noqa: E731
            session, rounds = decode(decoder, prompt, 99, knobs)
            assert session.tokens == expected
            for place, round_ in enumerate(rounds[:-2]):
                if round_.target_tokens == 1 and rounds[place + 1].target_tokens > 1:
                    without += 1
                    different += round_.tokens[-1] != rounds[place - 1].tokens[-1]  # not the one before once more
    assert without > 5
    assert different > 3


def test_texts_of_one_and_two_tokens_equal_generate(make_model: MakeModel, reference: Reference) -> None:
    model = make_model("qwen2", vocabulary=12)
    prompts = [[3], [4, 1, 4, 1, 4, 1], [0, 0, 0, 0, 0]]
    for new in (1, 2):
        expected = reference(model, prompts, new)
        for prompt, tokens in zip(prompts, expected, strict=True):
            for shape in SHAPES:
                session, rounds = decode(LookaheadDecoder(Pair(model)), prompt, new, of_shape(shape))
                assert session.tokens == tokens
                assert len(rounds) <= new
                assert max(round_.accepted for round_ in rounds) < new  # no more is verified than there is room for


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_text_ends_where_generate_ends_it(make_model: MakeModel, reference: Reference, family: str) -> None:
    model = make_model(family, vocabulary=12)
    prompts = random_prompts(12, 12)
    accepted = ended = 0
    for end in range(0, 12, 3):
        model.generation_config.eos_token_id = [end, (end + 1) % 12]
        pair = Pair(model)
        assert pair.eos_token_ids == {end, (end + 1) % 12}
        # Prompts hold such tokens, and may end in one.
        options = [*prompts, [end], [3, end, 4, end], [end, 5, end, 5, end, 5]]
        for number, (prompt, tokens) in enumerate(zip(options, reference(model, options, 40), strict=True)):
            session, rounds = decode(
                LookaheadDecoder(pair), prompt, 40, (of_shape((5, 3, 5)), changing(number))[number % 2]
            )
            assert session.tokens == tokens
            assert session.finish_reason == ("eos" if tokens[-1] in pair.eos_token_ids else "length")
            if session.finish_reason == "eos":
                ended += 1
                accepted += rounds[-1].accepted
    model.generation_config.eos_token_id = None
    assert ended > 10
    assert accepted > 10  # tokens of guesses, in rounds that ended a text
