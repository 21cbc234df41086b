"""Texts of encoder-decoders in a batch are those that each source gives alone, whatever the sources' lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from specgym.decoding import AutoregressiveDecoder, Decoder, Pair, Sampling, SpeculativeDecoder
from specgym.decoding.decoders.batch import TextRequest, generate_texts
from specgym.decoding.models.encoder import passes
from tests.helpers.encoder_decoders import KINDS, encoder_decoder, law_of, noisy_decoder, stock_tokens
from tests.helpers.known_distributions import p_value_of

NEW = 11
# Of 2, 7, 12 and 17 tokens.
SOURCES = [[5 + (7 * number + 3 * place) % 80 for place in range(2 + 5 * (number % 4))] for number in range(8)]


@cache
def known(kind: str) -> tuple[Any, list[list[int]]]:
    """A model and the texts that it generates of the sources."""
    model = encoder_decoder(kind)
    return model, [stock_tokens(model, source, max_new_tokens=NEW) for source in SOURCES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_generate_gives(kind: str, joint_passes: list[int]) -> None:
    model, expected = known(kind)
    pair = Pair(model, noisy_decoder(model, 0.05, of="coder"))  # with an encoder of its own
    decoders: list[Decoder[Any]] = [AutoregressiveDecoder(pair), SpeculativeDecoder(pair)]
    for decoder in decoders:
        for size in (1, 3, 8):
            joint_passes.clear()
            lengths = [] if decoder is decoders[0] else [{"draft_length": 1 + 2 * number % 3} for number in range(size)]
            generations = decoder.generate_batch(SOURCES[:size], max_new_tokens=NEW, knobs=lengths or None)
            assert [generation.tokens for generation in generations] == expected[:size]
            assert joint_passes.count(size) >= (0 if size == 1 else 3)
    assert sum(round_.accepted for text in generations for round_ in text.rounds) > 0
    plain, speculative = decoders
    requests = [
        TextRequest(speculative if number % 2 else plain, source, 3 + 5 * number % 9)
        for number, source in enumerate(SOURCES)
    ]
    for request, generation, text in zip(requests, generate_texts(requests, 3), expected, strict=True):
        assert generation.tokens == text[: request.max_new_tokens]  # though others have come and gone


def test_plain_decoding_reads_all_texts_in_one_pass_a_token_and_their_sources_in_one_before(
    joint_passes: list[int],
) -> None:
    model, read = known("t5")[0], list[int]()
    decoder = AutoregressiveDecoder(Pair(model))
    decoder.generate_batch(SOURCES[:2], max_new_tokens=2)  # tries the model
    joint_passes.clear()
    with model.get_encoder().register_forward_pre_hook(
        lambda _, __, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True
    ):
        decoder.generate_batch(SOURCES[:5], max_new_tokens=NEW)
    assert joint_passes == [5] * NEW
    assert read == [5]


def _of_the_first_text(part: Any, positions: Tensor, *rest: Any, **more: Any) -> Tensor:
    return biases(part, positions[:1].expand_as(positions), *rest, **more)


def _nothing_hidden(ends: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(len(ends), 1, 1, columns, dtype=dtype)


biases = passes._biases
BREAKAGES: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "distances": ("t5", "_biases", _of_the_first_text),
    "positions": ("pegasus", "numbers", lambda count, _: torch.arange(count) + 1),
    "ends of sources": ("bart", "rows_behind", _nothing_hidden),
}


@pytest.mark.parametrize(("kind", "name", "wrong"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_model_that_reads_otherwise_in_a_batch_reads_text_by_text(
    kind: str,
    name: str,
    wrong: Callable[..., Tensor],
    joint_passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = encoder_decoder(kind)
    monkeypatch.setattr(passes, name, wrong)
    generations = AutoregressiveDecoder(Pair(model)).generate_batch(SOURCES[:3], max_new_tokens=NEW)
    assert [generation.tokens for generation in generations] == known(kind)[1][:3]
    assert joint_passes == [3]  # the trial's
    assert "one after another, not in one pass: it gives other logits there" in caplog.text


def test_sampled_batches_follow_the_law_of_the_target(joint_passes: list[int]) -> None:
    model = encoder_decoder("t5", layers=1, vocabulary=5)
    with torch.no_grad():
        model.lm_head.weight *= 5  # so that laws are told apart by few texts
    draft = noisy_decoder(model, 0.5)
    source, other = [1, 0, 1], [2, 1, 0, 1, 2, 0]
    generations = SpeculativeDecoder(Pair(model, draft)).generate_batch(
        [source if number % 4 else other for number in range(160)],
        max_new_tokens=2,
        sampling=Sampling(),
        seed=1,
        batch_size=40,
    )
    texts = [tuple(generation.tokens) for number, generation in enumerate(generations) if number % 4]
    counts = {text: texts.count(text) for text in texts}
    assert p_value_of(counts, law_of(model, source)) > 1e-3
    assert p_value_of(counts, law_of(draft, source)) < 1e-6
    assert p_value_of(counts, law_of(model, other)) < 1e-6
    assert sum(joint_passes) > 2 * 160
