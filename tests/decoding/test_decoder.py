"""Sessions: knobs, prompts, where a text ends, rollback, streaming, seeds, and what is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from specgym.decoding import (
    AutoregressiveDecoder,
    Decoder,
    KnobError,
    LanguageModel,
    ModelDrafter,
    NGramDrafter,
    NumericalError,
    Pair,
    PromptError,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
    VocabularyMismatchError,
)
from specgym.decoding.drafts.drafter import DraftStep, OneHotStep
from tests.helpers.toy_profile import ENDS, charged

VOCABULARY = 8
MakeTable = Callable[..., LanguageModel]
TableOf = Callable[..., LanguageModel]
Ends = Callable[[Pair, int], ThresholdDecoder]


def counting(vocabulary: int = VOCABULARY) -> Tensor:
    """A table whose likeliest next token is always the last one plus one."""
    table = torch.zeros(vocabulary, vocabulary, vocabulary)
    for token in range(vocabulary):
        table[:, token, (token + 1) % vocabulary] = 12.0
    return table


class ScriptedDrafter:
    """Proposes what it is told, whatever the context."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.name = "scripted"
        self.vocabulary_size = VOCABULARY
        self.tokens = list(tokens)
        self.truncated: list[int] = []

    def start(self, prompt: Sequence[int], *others: object) -> ScriptedDrafter:
        return self

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        return map(OneHotStep, self.tokens[:count])

    def truncate(self, length: int) -> None:
        self.truncated.append(length)


# The target counts up from the prompt's last token, 1: it would say 2 3 4 5 6 7 0 ...
ROLLBACKS = [
    # draft, rollback: kept, emitted, taken back
    ([2, 3, 4, 5], 1, 4, (2, 3, 4, 5, 6), ()),
    ([2, 3, 4, 5], 4, 4, (2, 3, 4, 5, 6), ()),
    ([2, 3, 7, 5], 1, 2, (2, 3, 4), (7, 5)),
    ([2, 3, 7, 5], 2, 1, (2, 3), (3, 7, 5)),
    ([2, 3, 7, 5], 3, 0, (2,), (2, 3, 7, 5)),
    ([2, 3, 7, 5], 4, 0, (2,), (2, 3, 7, 5)),
    ([2, 3, 4, 7], 2, 2, (2, 3, 4), (4, 7)),
    ([7, 3, 4, 5], 1, 0, (2,), (7, 3, 4, 5)),
    ([7, 3, 4, 5], 4, 0, (2,), (7, 3, 4, 5)),
    ([], 4, 0, (2,), ()),
]


@pytest.mark.parametrize(("draft", "rollback", "kept", "emitted", "taken_back"), ROLLBACKS)
def test_a_rejection_takes_the_last_rollback_draft_tokens_back(
    table_of: TableOf,
    draft: list[int],
    rollback: float,
    kept: int,
    emitted: tuple[int, ...],
    taken_back: tuple[int, ...],
) -> None:
    target = table_of(counting())
    drafter = ScriptedDrafter(draft)
    session = ThresholdDecoder(Pair(target, drafter), 4, "never").start([0, 1], max_new_tokens=20)
    round_ = session.step({"fallback": 0.0, "rollback": rollback})
    assert round_.tokens == emitted == tuple(session.tokens)
    assert (round_.drafted, round_.accepted, round_.taken_back) == (len(draft), kept, taken_back)
    assert drafter.truncated == [2 + kept]
    assert session.target.length == 2 + len(emitted) - 1  # all but the last token
    assert session.context == [0, 1, *emitted]


def test_a_token_put_further_back_is_drawn_from_the_target(table_of: TableOf) -> None:
    """After the rejected 7 one token more is taken back; the residual that is left belongs to another position."""
    target = table_of(counting() / 12)  # soft: the likeliest token has a probability of 0.28, the others 0.10
    decoder = ThresholdDecoder(Pair(target, ScriptedDrafter([2, 7])), 2, "never")
    seen = np.zeros(VOCABULARY)
    for seed in range(3000):
        session = decoder.start([0, 1], max_new_tokens=9, sampling=Sampling(), seed=seed)
        round_ = session.step({"fallback": 0.75, "rollback": 2.0})  # keeps 2 outright (distance 0.72), tests 7 (0.90)
        if round_.taken_back == (2, 7):
            seen[round_.tokens[0]] += 1
    assert seen.sum() > 2500
    p = Sampling().probabilities(counting()[0, 1] / 12)
    assert np.abs(seen / seen.sum() - p.numpy()).max() < 0.04  # more than four standard errors


def test_a_fractional_rollback_is_rounded_with_the_right_mean(table_of: TableOf) -> None:
    decoder = ThresholdDecoder(Pair(table_of(counting()), ScriptedDrafter([2, 3, 4, 5, 6, 7])), 6, "never")
    session: Any = decoder.start([0, 1], max_new_tokens=5, seed=0)
    for rollback in (1.0, 1.25, 2.5, 5.9, 6.0):
        rounded = [session._whole_rollback(rollback) for _ in range(4000)]
        assert set(rounded) <= {math.floor(rollback), math.ceil(rollback)}
        assert abs(sum(rounded) / 4000 - rollback) < 0.04  # five standard errors


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rollback", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_every_round_makes_progress(make_table: MakeTable, ends: Ends, temperature: float, rollback: float) -> None:
    pair = Pair(make_table(VOCABULARY, seed=1), ModelDrafter(make_table(VOCABULARY, seed=2)))
    session = ends(pair, 6).start([1], max_new_tokens=60, sampling=Sampling(temperature), seed=0)
    while not session.finished:
        before = len(session.tokens)
        round_ = session.step({"fallback": 0.2, "rollback": rollback})
        assert len(round_.tokens) >= 1
        assert len(session.tokens) == before + len(round_.tokens)
        assert 0 <= round_.accepted <= round_.drafted <= 6
        assert round_.divergence >= 0
    assert len(session.tokens) == 60


def decoders(target: LanguageModel, draft: Any) -> list[Decoder]:
    """One of each kind."""
    pair = Pair(target, draft)
    return [AutoregressiveDecoder(pair), SpeculativeDecoder(pair), *(make(pair, 16) for make in ENDS.values())]


def test_a_text_ends_at_eos_inside_an_accepted_span(table_of: TableOf) -> None:
    for eos in ([4], [4, 6]):
        for decoder in decoders(table_of(counting(), eos=eos), ModelDrafter(table_of(counting()))):
            generation = decoder.generate([0, 1], max_new_tokens=20)
            assert generation.tokens == [2, 3, 4]
            assert generation.finish_reason == "eos"
            if decoder.name != "autoregressive":
                assert len(generation.rounds) == 1
                assert generation.rounds[0].accepted == 3


def test_a_text_ends_at_eos_as_the_targets_own_token(table_of: TableOf) -> None:
    for decoder in decoders(table_of(counting(), eos=[2]), ScriptedDrafter([7, 2, 2])):
        generation = decoder.generate([0, 1], max_new_tokens=20)
        assert (generation.tokens, generation.finish_reason) == ([2], "eos")


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7, 13])
def test_max_new_tokens_is_kept_inside_an_accepted_span(table_of: TableOf, limit: int) -> None:
    for decoder in decoders(table_of(counting()), ModelDrafter(table_of(counting()))):
        generation = decoder.generate([0, 1], max_new_tokens=limit)
        assert generation.tokens == [(2 + place) % VOCABULARY for place in range(limit)]
        assert generation.finish_reason == "length"
        assert sum(len(round_.tokens) for round_ in generation.rounds) == limit


def test_the_targets_context_limit_ends_the_text(table_of: TableOf) -> None:
    for decoder in decoders(table_of(counting(), context=12), ModelDrafter(table_of(counting()))):
        generation = decoder.generate([0, 1], max_new_tokens=100)
        assert len(generation.tokens) == 10
        assert generation.finish_reason == "context"
        with pytest.raises(PromptError, match="the prompt has 12 tokens and table a context of 12"):
            decoder.generate([1] * 12, max_new_tokens=1)
        assert decoder.generate([1] * 11, max_new_tokens=9).finish_reason == "context"


@pytest.mark.parametrize("context", [1, 2, 3, 6, 10])
def test_past_the_drafts_context_the_target_goes_on_alone(table_of: TableOf, context: int) -> None:
    for decoder in decoders(table_of(counting()), ModelDrafter(table_of(counting(), context=context)))[1:]:
        generation = decoder.generate([7, 0, 1], max_new_tokens=17)
        assert generation.tokens == [(2 + place) % VOCABULARY for place in range(17)]
        assert generation.rounds[-1].drafted == 0


def test_a_prompt_may_be_one_token_a_list_an_array_or_a_tensor_or_a_batch_of_one_of_them(table_of: TableOf) -> None:
    for decoder in decoders(table_of(counting()), PromptLookupDrafter(VOCABULARY)):
        for prompt in ([1], (1,), np.array([1]), torch.tensor([1]), torch.tensor([[1]]), np.array([[1]]), [[1]]):
            assert decoder.generate(prompt, max_new_tokens=2).tokens == [2, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (torch.tensor([], dtype=torch.int64), "the prompt is empty"),
        ([1, 8], "ids from 1 to 8, but table has a vocabulary of 8"),
        ([-1, 2], "ids from -1 to 2"),
        (torch.ones(2, 3, dtype=torch.int64), r"one prompt at a time: expected shape \(tokens,\), got \(2, 3\)"),
        (torch.tensor(3), "one prompt at a time"),
        ([1.5, 2.0], "whole token ids"),
        (torch.tensor([1.0]), "whole token ids"),
        (np.ones((2, 3), np.int64), r"one prompt at a time: expected shape \(tokens,\), got \(2, 3\)"),
        ([[1, 2], [3]], "one prompt at a time: this is a list of 2; generate_batch takes several"),
        ([[]], "the prompt is empty"),
        ([["text"]], "one list or tensor of whole token ids"),
        ({"input_ids": [1, 2]}, "take its 'input_ids'"),
        (7, "one list or tensor of whole token ids; this is a int"),
        ("text", "has no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(table_of: TableOf, prompt: Any, message: str) -> None:
    decoder = AutoregressiveDecoder(Pair(table_of(counting())))
    with pytest.raises(PromptError, match=message):
        decoder.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize("count", [0, -1, 1.5, math.nan, math.inf])
def test_max_new_tokens_is_a_positive_whole_number(table_of: TableOf, count: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1"):
        AutoregressiveDecoder(Pair(table_of(counting()))).generate([1], max_new_tokens=count)


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (SpeculativeDecoder, {"length": 3}, "SpeculativeDecoder has no knob 'length'; it has: draft_length"),
        (AutoregressiveDecoder, {"fallback": 0.5}, "has no knob 'fallback'; it has: none"),
        (SpeculativeDecoder, {"draft_length": -1}, "draft_length must be a whole number from 0 to 16, got -1"),
        (SpeculativeDecoder, {"draft_length": 17}, "draft_length must be a whole number from 0 to 16, got 17"),
        (SpeculativeDecoder, {"draft_length": 2.5}, "draft_length must be a whole number from 0 to 16, got 2.5"),
        (SpeculativeDecoder, {"draft_length": math.nan}, "draft_length must be a whole number from 0 to 16, got nan"),
        (ThresholdDecoder, {"fallback": -0.01}, "fallback must be a number from 0 to 1"),
        (ThresholdDecoder, {"fallback": 1.01}, "fallback must be a number from 0 to 1"),
        (ThresholdDecoder, {"rollback": 0.9}, "rollback must be a number from 1 to 16"),
        (ThresholdDecoder, {"rollback": math.inf}, "rollback must be a number from 1 to 16, got inf"),
    ],
)
def test_knobs_that_are_unknown_or_out_of_range_are_refused(
    table_of: TableOf, kind: Any, knobs: dict[str, float], message: str
) -> None:
    decoder = charged(kind(Pair(table_of(counting()), PromptLookupDrafter(VOCABULARY))))
    with pytest.raises(KnobError, match=message):
        decoder.generate([1], max_new_tokens=2, knobs=knobs)
    session = decoder.start([1], max_new_tokens=2)
    with pytest.raises(KnobError, match=message):
        session.step(knobs)
    assert session.tokens == []


def test_knobs_may_change_every_round(table_of: TableOf) -> None:
    pair = Pair(table_of(counting()), ModelDrafter(table_of(counting())))
    session = SpeculativeDecoder(pair).start([0, 1], max_new_tokens=100)
    assert [session.step({"draft_length": length}).drafted for length in (3, 1, 16, 2)] == [3, 1, 16, 2]
    assert session.step().drafted == 5  # the default


def test_a_finished_session_gives_empty_rounds(table_of: TableOf) -> None:
    for decoder in decoders(table_of(counting()), PromptLookupDrafter(VOCABULARY)):
        session = decoder.start([1], max_new_tokens=1)
        assert session.step().tokens == (2,)
        assert session.finished
        round_ = session.step()
        assert (round_.tokens, round_.drafted, round_.accepted, round_.divergence) == ((), 0, 0, 0)
        assert session.tokens == [2]


def test_pairs_that_do_not_fit_are_refused(table_of: TableOf) -> None:
    target = table_of(counting())
    for draft in (PromptLookupDrafter(9), ModelDrafter(table_of(counting(9), name="nine"))):
        with pytest.raises(VocabularyMismatchError, match=r"a vocabulary of 8 tokens and draft .* one of 9"):
            Pair(target, draft)
    for kind in (SpeculativeDecoder, ThresholdDecoder):
        with pytest.raises(ValueError, match=f"{kind.__name__} needs a draft, and pair table has none"):
            kind(Pair(target))
        for length in (0, 1.5):
            with pytest.raises(ValueError, match="must be a whole number of at least 1"):
                kind(Pair(target, PromptLookupDrafter(VOCABULARY)), length)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [7, np.int64(7)])
def test_a_seed_fixes_the_text_and_other_seeds_give_others(make_table: MakeTable, seed: Any) -> None:
    for decoder in decoders(make_table(VOCABULARY, seed=1), ModelDrafter(make_table(VOCABULARY, seed=2))):
        knobs = {"rollback": 1.5} if decoder.name == "threshold" else {}

        def text(seed: Any, decoder: Decoder = decoder, knobs: dict[str, float] = knobs) -> list[int]:
            options: dict[str, Any] = {"max_new_tokens": 40, "sampling": Sampling(), "knobs": knobs}
            return decoder.generate([1], seed=seed, **options).tokens

        assert text(seed) == text(7)
        assert text(seed) != text(8)
        assert text(None) != text(None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_in_the_middle_of_a_text_are_refused(table_of: TableOf, value: float, temperature: float) -> None:
    table = counting() * 5
    table[:, 5, 3] = value
    for decoder in decoders(table_of(table), ModelDrafter(table_of(counting() * 5))):
        with pytest.raises(NumericalError, match=r"table gave NaN or infinite logits after \d tokens"):
            decoder.generate([0, 1], max_new_tokens=30, sampling=Sampling(temperature), seed=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_draft_costs_speed_only(table_of: TableOf, temperature: float) -> None:
    table = torch.full((VOCABULARY,) * 3, math.nan)
    pair = Pair(table_of(counting() * 5), ModelDrafter(table_of(table)))
    for decoder in (SpeculativeDecoder(pair), *(make(pair, 16) for make in ENDS.values())):
        generation = decoder.generate([0, 1], max_new_tokens=9, sampling=Sampling(temperature), seed=0)
        assert generation.tokens == [2, 3, 4, 5, 6, 7, 0, 1, 2]


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_the_metrics_add_up(make_table: MakeTable, ends: Ends) -> None:
    pair = Pair(make_table(VOCABULARY, seed=1), ModelDrafter(make_table(VOCABULARY, seed=2)))
    generation = ends(pair, 5).generate([1], max_new_tokens=50, sampling=Sampling(), seed=0, knobs={"fallback": 0.4})
    rounds = generation.rounds
    assert [token for round_ in rounds for token in round_.tokens] == generation.tokens
    assert generation.draft_acceptance_rate == sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds)
    assert generation.mean_acceptance_length == 50 / len(rounds)
    assert generation.divergence == sum(r.divergence for r in rounds) / 50
    assert 0 < generation.divergence <= 0.4
    assert generation.seconds > 0
    assert generation.ms_per_token == pytest.approx(1000 * generation.seconds / 50)
    assert all(len(r.tokens) - r.accepted in (0, 1) and r.accepted + len(r.taken_back) == r.drafted for r in rounds)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w7."""
    words = Tokenizer(WordLevel({"<unk>": VOCABULARY} | {f"w{i}": i for i in range(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_streams_give_the_same_text_as_the_generation(
    table_of: TableOf, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair(table_of(counting()), ModelDrafter(table_of(counting())), tokenizer)
    for decoder in (AutoregressiveDecoder(pair), SpeculativeDecoder(pair)):
        generation = decoder.generate("w0 w1", max_new_tokens=12)
        assert generation.text == "w2 w3 w4 w5 w6 w7 w0 w1 w2 w3 w4 w5"

        printer = TextStreamer(tokenizer, skip_prompt=True)
        decoder.generate("w0 w1", max_new_tokens=12, streamer=printer)
        assert capsys.readouterr().out.strip() == generation.text

        pieces = TextIteratorStreamer(tokenizer, skip_prompt=False, timeout=20)
        options: Any = {"max_new_tokens": 12, "streamer": pieces}
        writer = threading.Thread(target=decoder.generate, args=("w0 w1",), kwargs=options)
        writer.start()
        assert "".join(pieces).strip() == f"w0 w1 {generation.text}"
        writer.join()


def test_a_stream_ends_when_the_generation_fails(table_of: TableOf, tokenizer: PreTrainedTokenizerFast) -> None:
    table = counting()
    table[:, 4, :] = math.nan
    decoder = AutoregressiveDecoder(Pair(table_of(table), tokenizer=tokenizer))
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    with pytest.raises(NumericalError):
        decoder.generate([1], max_new_tokens=12, streamer=pieces)
    assert "".join(pieces).strip() == "w2 w3 w4"


def test_real_models_reach_their_context_limit(
    make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]
) -> None:
    model = make_model("gpt2", context=24)
    expected = AutoregressiveDecoder(Pair(model)).generate([1, 2, 3], max_new_tokens=99)
    assert len(expected.tokens) == 21
    drafts: list[Any] = [make_noisy(model, 0.01), make_noisy(make_model("gpt2", context=24), 0.0)]
    drafts.append(NGramDrafter.fit([expected.tokens], 96))
    for draft in drafts:
        generation = SpeculativeDecoder(Pair(model, draft)).generate([1, 2, 3], max_new_tokens=99)
        assert generation.tokens == expected.tokens
        assert generation.finish_reason == "context"
