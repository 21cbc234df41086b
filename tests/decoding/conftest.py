"""Texts by `transformers` itself, to compare decoders with, and a small tokeniser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.tokenizer import train_tokenizer
from tests.helpers.counting import counting_model, words


def generated(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Texts of plain greedy `generate`; prompts of equal length share a batch, so that nothing is padded."""
    expected: dict[int, list[int]] = {}
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    options = model.generation_config.eos_token_id
    ends = set(options if isinstance(options, list) else [] if options is None else [options])
    for length, numbers in by_length.items():
        batch = torch.tensor([prompts[number] for number in numbers])
        output = cast(Any, model).generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        for number, row in zip(numbers, output[:, length:].tolist(), strict=True):
            stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            expected[number] = row[:stop]
    return [expected[number] for number in range(len(prompts))]


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[list[int]]]:
    """`generated`."""
    return generated


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer of 300 tokens, trained on `words`."""
    return train_tokenizer([words(500)], 300)


@pytest.fixture
def counting_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """With a model that counts in `target`, its tokenizer, and text for it in `notes.txt`."""
    counting_model(len(tokenizer)).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "notes.txt").write_text(words(9000))
    return tmp_path
