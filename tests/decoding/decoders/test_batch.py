"""Texts in a batch are those that each prompt gives alone: greedy as `generate()`'s, in law when sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from specgym.decoding import (
    ArgumentError,
    AutoregressiveDecoder,
    Batch,
    BatchError,
    Decoder,
    EarlyExit,
    KnobError,
    NumericalError,
    Pair,
    PromptError,
    PromptLookupDrafter,
    Sampling,
    SpecgymError,
    SpeculativeDecoder,
)
from specgym.decoding.decoders.batch import TextRequest, generate_texts
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.expected_gain import KeepChances
from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.models.joint.passes import Answer, JoinedPasses, Request
from specgym.decoding.models.kv_cache import TokenTree
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.architectures import Case, build
from tests.helpers.known_distributions import exact_joint, p_value_of
from tests.helpers.small_eagle_heads import small_head
from tests.helpers.small_medusa_heads import random_heads
from tests.helpers.toy_profile import charged, toy_profile

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
NEW = 20
# Of 1, 6, 11 and 16 tokens.
PROMPTS = [[5 + (7 * number + 3 * place) % 80 for place in range(1 + 5 * (number % 4))] for number in range(8)]


WINDOWED = {
    "gemma3": Case("gemma3_text"),  # windows in some layers
    "mistral with a window": Case("mistral"),
}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "gpt_neox", "phi", *WINDOWED])
def test_a_batch_gives_what_generate_gives(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, joint_passes: list[int], family: str
) -> None:
    model = build(WINDOWED[family]) if family in WINDOWED else make_model(family)
    pair = Pair(model, make_noisy(model, 0.02))
    expected = reference(model, PROMPTS, NEW)
    decoders: list[Decoder[Any]] = [AutoregressiveDecoder(pair), SpeculativeDecoder(pair)]
    for decoder in decoders:
        for size in (1, 3, 8):
            joint_passes.clear()
            generations = decoder.generate_batch(PROMPTS[:size], max_new_tokens=NEW)
            assert [generation.tokens for generation in generations] == expected[:size]
            assert joint_passes.count(size) >= (0 if size == 1 else 4)


def test_plain_decoding_reads_all_texts_in_one_pass_a_token(make_model: MakeModel, joint_passes: list[int]) -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    AutoregressiveDecoder(Pair(make_model("llama"))).generate_batch(prompts, max_new_tokens=NEW)
    assert joint_passes[-NEW:] == [len(prompts)] * NEW


@pytest.mark.parametrize("kind", ["tree", "lookahead", "medusa", "prompt-lookup", "eagle", "eagle tree"])
def test_trees_and_windows_share_passes(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, joint_passes: list[int], kind: str
) -> None:
    model = make_model("llama")
    drafts: dict[str, Callable[[], Any]] = {
        "prompt-lookup": lambda: PromptLookupDrafter(96),
        "eagle": lambda: small_head(model),
        "eagle tree": lambda: small_head(model),
    }
    pair = Pair(model, drafts.get(kind, lambda: make_noisy(model, 0.02))())
    decoders: dict[str, Callable[[], Decoder[Any]]] = {
        "tree": lambda: DraftTreeDecoder(pair),
        "eagle": lambda: SpeculativeDecoder(pair),
        "eagle tree": lambda: DraftTreeDecoder(pair),
        "lookahead": lambda: LookaheadDecoder(pair),
        "medusa": lambda: MedusaDecoder(pair, random_heads(model, spread=0.01)),
        "prompt-lookup": lambda: SpeculativeDecoder(pair),
    }
    decoder = decoders[kind]()
    generations = decoder.generate_batch(PROMPTS[:3], max_new_tokens=NEW, seed=3)
    assert [generation.tokens for generation in generations] == reference(model, PROMPTS[:3], NEW)
    assert joint_passes.count(3) >= 4
    for number, together in enumerate(generations):
        alone = decoder.generate(PROMPTS[number], max_new_tokens=NEW, seed=3 + number)
        assert [round_.tokens for round_ in together.rounds] == [round_.tokens for round_ in alone.rounds]


@pytest.mark.parametrize("kind", ["model", "eagle"])
def test_passes_of_a_batch_are_captured_and_give_the_same(
    make_model: MakeModel, make_noisy: MakeModel, kind: str
) -> None:
    model = make_model("llama")
    pair = Pair(model, small_head(model) if kind == "eagle" else make_noisy(model, 0.02))
    decoder = SpeculativeDecoder(pair)
    options: dict[str, Any] = {"max_new_tokens": NEW, "knobs": {"draft_length": 2}, "seed": 3}
    first = decoder.generate_batch(PROMPTS[1:4], **options)
    with pair.capturing(after=1):
        decoder.generate_batch(PROMPTS[1:4], **options)
    assert pair.target.captured is not None
    assert any(texts == 3 for texts, *_ in pair.target.captured.graphs)
    again = decoder.generate_batch(PROMPTS[1:4], **options)
    assert [text.tokens for text in again] == [text.tokens for text in first]
    assert [[round_.tokens for round_ in text.rounds] for text in again] == [
        [round_.tokens for round_ in text.rounds] for text in first
    ]


def test_every_text_has_knobs_and_a_seed_of_its_own(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama")
    decoder = ThresholdDecoder(Pair(model, make_noisy(model, 0.2)))
    knobs = [{"fallback": 0.1 + 0.3 * number, "rollback": 1.0 + number} for number in range(3)]
    sampling = Sampling(temperature=0.7)
    options: dict[str, Any] = {"max_new_tokens": NEW, "sampling": sampling}
    alone = [decoder.generate(PROMPTS[number], seed=7 + number, knobs=knobs[number], **options) for number in range(3)]
    together = decoder.generate_batch(PROMPTS[:3], seed=7, knobs=knobs, **options)
    for single, joint in zip(alone, together, strict=True):
        assert single.tokens == joint.tokens
        assert [(round_.drafted, round_.accepted) for round_ in single.rounds] == [
            (round_.drafted, round_.accepted) for round_ in joint.rounds
        ]
    assert together[0].divergence < together[2].divergence  # the settings were told apart


@pytest.mark.parametrize("decoder_class", [ThresholdDecoder, SpeculativeDecoder])
def test_drafts_of_a_batch_end_by_the_expected_gain_as_alone(
    make_model: MakeModel, make_noisy: MakeModel, decoder_class: type[ThresholdDecoder] | type[SpeculativeDecoder]
) -> None:
    model = make_model("llama")
    usual = KeepChances.assumed()
    sure = KeepChances(usual.kept**0.1, usual.average**0.1)  # drafts of random weights are sure of nothing
    pair = Pair(model, make_noisy(model, 0.02))
    decoder = charged(decoder_class(pair, 8, stop="expected-gain"), toy_profile(0.05, chances=sure))
    options: dict[str, Any] = {"max_new_tokens": NEW, "knobs": {"fallback": 0.0} if not decoder.lossless else {}}
    together = decoder.generate_batch(PROMPTS[:3], **options)
    lengths = [[round_.drafted for round_ in text.rounds] for text in together]
    alone = [decoder.generate(prompt, **options) for prompt in PROMPTS[:3]]
    assert lengths == [[round_.drafted for round_ in text.rounds] for text in alone]
    assert len({length for text in lengths for length in text[:-2]}) > 1  # the rule had its say


def p_value_of_batches(pair: Pair, decoder: Decoder[Any], texts: int) -> float:
    """The chi-square test of the first two tokens of texts from one prompt, among texts of other lengths."""
    prompts = [[1, 2, 3] if number % 2 else [4, 2, 3, 1, 1 + number % 4] for number in range(texts)]
    generations = decoder.generate_batch(prompts, max_new_tokens=2, sampling=Sampling(), seed=1, batch_size=40)
    counts: dict[tuple[int, ...], int] = {}
    for generation in generations[1::2]:
        text = tuple(generation.tokens)
        counts[text] = counts.get(text, 0) + 1
    return p_value_of(counts, exact_joint(pair.target, Sampling(), [1, 2, 3], 2))


def test_sampled_batches_follow_the_targets_distribution(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, make_noisy: MakeModel, joint_passes: list[int]
) -> None:
    model = make_model("llama", vocabulary=6, layers=1, spread=0.6)
    pair = Pair(model, make_noisy(model, 0.1))
    decoder = SpeculativeDecoder(pair)
    assert p_value_of_batches(pair, decoder, 240) > 1e-3
    assert sum(joint_passes) > 2 * 240  # of the draft and of the target

    def mixed_up(self: JoinedPasses, requests: Sequence[Request]) -> list[Answer]:
        results = read(self, requests)
        return [
            results[place - 1] if results[place - 1].scores.shape == result.scores.shape else result
            for place, result in enumerate(results)
        ]

    read = JoinedPasses.read
    monkeypatch.setattr(JoinedPasses, "read", mixed_up)  # every text gets the scores of the one before it
    assert p_value_of_batches(pair, decoder, 240) < 1e-6


def test_texts_come_and_go(make_model: MakeModel, make_noisy: MakeModel, reference: Reference) -> None:
    pair = Pair(model := make_model("llama"), make_noisy(model, 0.05))
    plain, speculative = AutoregressiveDecoder(pair), SpeculativeDecoder(pair)
    expected = reference(model, PROMPTS, NEW)
    batch, sessions = Batch(), list[Any]()
    for number in (1, 2, 3):
        decoder: Decoder[Any] = plain if number == 2 else speculative
        sessions.append(batch.add(decoder, PROMPTS[number], max_new_tokens=NEW))
        batch.step()
    batch.leave(sessions[1])  # in the middle of its text, and of the rows
    batch.step({sessions[0]: {"draft_length": 2}})
    sessions[0].step()  # by itself
    sessions.append(batch.add(plain, PROMPTS[5], max_new_tokens=NEW))
    while len(batch):
        batch.step()
    assert batch.step() == {}
    assert [sessions[place].tokens for place in (0, 2, 3)] == [expected[1], expected[3], expected[5]]
    assert sessions[1].tokens == expected[2][: len(sessions[1].tokens)]
    with pytest.raises(KnobError, match="not in this batch"):
        batch.step({sessions[1]: {}})
    with pytest.raises(SpecgymError, match="has left its batch"):
        sessions[1].step()


def test_each_text_may_do_something_else(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, joint_passes: list[int]
) -> None:
    model = make_model("llama")
    decoder = SpeculativeDecoder(Pair(model, make_noisy(model, 0.05)))
    batch = Batch(3)
    first, second, third = (batch.add(decoder, prompt, max_new_tokens=6) for prompt in PROMPTS[1:4])
    drafted = batch.together({session: session.draft_one for session in (first, second, third)})
    assert joint_passes == [3, 3]  # in the trial of the draft, too
    assert [features is not None for features in drafted.values()] == [True] * 3
    joint_passes.clear()
    works: dict[Any, Callable[[], Any]] = {third: third.verify, first: first.verify, second: second.draft_one}
    results = batch.together(works)
    assert list(results) == [third, first, second]
    assert joint_passes == [3, 2]  # in the trial of the target, and the two that were verified
    assert first.tokens == list(results[first].tokens)
    assert second.tokens == []
    while not first.finished:
        batch.together({first: first.verify})  # by itself
    assert batch.sessions == [second, third]
    with pytest.raises(ArgumentError, match="not in this batch: finished, or of another one"):
        batch.together({second: second.verify, first: first.verify})
    assert second.tokens == []

    def fail() -> Any:
        raise RuntimeError("as it may happen")

    with pytest.raises(RuntimeError, match="as it may happen"):
        batch.together({second: fail, third: third.verify})
    assert batch.sessions == [third]
    while not third.finished:
        batch.together({third: third.verify})
    assert [first.tokens, third.tokens] == reference(model, [PROMPTS[1], PROMPTS[3]], 6)


def test_places_are_used_again(make_model: MakeModel, make_noisy: MakeModel) -> None:
    model = make_model("llama", layers=1)
    decoder = SpeculativeDecoder(Pair(model, make_noisy(model, 0.05)))
    batch, sizes = Batch(), set[int]()
    begun = 0
    while begun < 60 or len(batch):
        while len(batch) < 4 and begun < 60:
            batch.add(decoder, PROMPTS[1 + begun % 3], max_new_tokens=3 + begun % 5)
            begun += 1
        batch.step()
        stores = [joint.cache for joint in batch._joining._passes.values() if joint is not None]
        assert all(len(store.slots) <= 4 for store in stores)
        sizes |= {part.numel() for store in stores for part in store.stored}
    assert len(stores) == 2
    assert all(store.slots == [] for store in stores)
    assert max(sizes) == 4 * 2 * 256 * 8  # texts, heads, positions, head size


def test_models_that_cannot_be_joined_read_one_after_another(
    make_model: MakeModel, reference: Reference, joint_passes: list[int]
) -> None:
    model = make_model("llama")
    decoder = SpeculativeDecoder(Pair(model, EarlyExit(1)))
    generations = decoder.generate_batch(PROMPTS[:3], max_new_tokens=NEW)
    assert [generation.tokens for generation in generations] == reference(model, PROMPTS[:3], NEW)
    assert joint_passes == []


def test_a_model_that_gives_other_scores_in_a_batch_is_told(
    make_model: MakeModel, reference: Reference, joint_passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = make_model("llama")
    forward = model.model.layers[0].forward

    def by_the_batch(states: Tensor, *rest: Any, **more: Any) -> Tensor:
        result: Tensor = forward(states, *rest, **more)
        return result + 0.1 * (states.shape[0] > 1)

    model.model.layers[0].forward = by_the_batch
    decoder = AutoregressiveDecoder(Pair(model))
    generations = decoder.generate_batch(PROMPTS[1:4], max_new_tokens=NEW)
    assert [generation.tokens for generation in generations] == [
        decoder.generate(prompt, max_new_tokens=NEW).tokens for prompt in PROMPTS[1:4]
    ]
    assert joint_passes == [3]  # the trial's
    assert "one after another" in caplog.text


def test_a_broken_text_leaves_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("llama")
    decoder = AutoregressiveDecoder(Pair(model))
    batch = Batch()
    sessions = [batch.add(decoder, prompt, max_new_tokens=NEW) for prompt in PROMPTS[1:4]]
    batch.step()
    stored = batch._joining._passes[model]
    assert stored is not None
    with torch.inference_mode():
        for part in stored.cache.stored:
            part[0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        batch.step()
    assert batch.sessions == sessions[1:]
    while len(batch):
        batch.step()
    expected = reference(model, PROMPTS[2:4], NEW)
    assert [session.tokens for session in sessions[1:]] == expected
    again = batch.add(decoder, PROMPTS[1], max_new_tokens=NEW)  # where NaN was
    other = batch.add(decoder, PROMPTS[3], max_new_tokens=NEW)
    while len(batch):
        batch.step()
    assert [again.tokens, other.tokens] == reference(model, [PROMPTS[1], PROMPTS[3]], NEW)


class Breaking(LogitsProcessor):
    """Breaks texts that begin like the second and the fourth prompt, after a while."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores, or NaN."""
        text = input_ids[0].tolist()
        if text[:6] == PROMPTS[1] and len(text) > 10:
            return scores * torch.nan
        if text[:16] == PROMPTS[3] and len(text) > 18:
            raise RuntimeError("as it may happen")
        return scores


def test_texts_that_fail_leave_the_others_to_be_finished(make_model: MakeModel, reference: Reference) -> None:
    model = make_model("llama")
    decoder = AutoregressiveDecoder(Pair(model))
    with pytest.raises(BatchError, match=r"2 of 6 texts .* text 1 \(counted from 0\): NumericalError.*NaN") as caught:
        decoder.generate_batch(PROMPTS[:6], max_new_tokens=NEW, logits_processor=[Breaking()], batch_size=3)
    generations, expected = caught.value.generations, reference(model, PROMPTS[:6], NEW)
    kept = [generation.tokens if generation is not None else None for generation in generations]
    assert kept == [expected[0], None, expected[2], None, *expected[4:]]
    assert {number: type(error) for number, error in caught.value.errors.items()} == {
        1: NumericalError,
        3: RuntimeError,
    }
    requests = [TextRequest(decoder, prompt, 4) for prompt in ([1, 2], [3, 2], [])]
    with pytest.raises(BatchError, match=r"1 of 3 texts .* text 2") as caught:
        generate_texts(requests, batch_size=2)
    assert isinstance(caught.value.__cause__, PromptError)
    with pytest.raises(PromptError):  # before anything was generated
        generate_texts(requests)


def test_what_cannot_be_a_batch_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel
) -> None:
    decoder = AutoregressiveDecoder(Pair(make_model("llama", layers=1)))
    monkeypatch.setattr(LanguageModel, "fresh", lambda self: pytest.fail("a text was begun"))
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (torch.zeros(2, 3, dtype=torch.int64), {}, PromptError, "without return_tensors"),
        ("one text", {}, PromptError, "a prompt each"),
        ([[1, 2], [3, 400]], {}, PromptError, "ids from 3 to 400"),
        ([[1], [2]], {"knobs": [{}]}, ArgumentError, "2 prompts have 1 settings"),
        ([[1], [2]], {"knobs": {"draft_length": 3}}, KnobError, "no knob"),
        ([[1], [2]], {"batch_size": 0}, ArgumentError, "batch_size"),
        ([[1], [2]], {"seed": "7"}, ArgumentError, "seed must be"),
        ([[1], [2]], {"seed": 2**64 - 1}, ArgumentError, "seed must be"),
    ]
    for prompts, options, error, message in cases:
        with pytest.raises(error, match=message):
            decoder.generate_batch(prompts, max_new_tokens=2, **options)
    assert decoder.generate_batch([], max_new_tokens=2) == []


def test_tokens_of_a_growing_tree_are_read_beside_other_texts(make_model: MakeModel) -> None:
    model = LanguageModel(make_model("llama"), prepack=False)
    joint = JoinedPasses(model)
    requests, expected = [], []
    grown = TokenTree([-1, -1, 1, 0, 2])
    for start in (3, 9, 6):
        text, alone = model.fresh(), model.fresh()
        for reader in (text, alone):
            reader.forward(torch.arange(1, 1 + start))
            reader.forward(torch.tensor([7, 8, 9]), TokenTree([-1, -1, 1]))
        slot = text.move_into(joint.cache)
        assert slot is not None
        requests.append(Request(slot, torch.tensor([3, 4]), grown, start, None, None, True))
        expected.append(alone.forward(torch.tensor([3, 4]), grown, hidden=True))
    requests.append(Request(requests.pop().slot, torch.tensor([5, 2, 4, 4]), None, 9, 2, None, False))
    alone.truncate(9)
    expected[-1] = alone.forward(torch.tensor([5, 2, 4, 4]), TokenTree([-1, -1, 1, 0]).chain(4), last=2)
    for answer, known in zip(joint.read(requests), expected, strict=True):
        torch.testing.assert_close(answer.scores, known.scores, atol=1e-5, rtol=1e-5)
        if known.hidden is not None:
            torch.testing.assert_close(answer.hidden, known.hidden, atol=1e-5, rtol=1e-5)
