"""Tables suit the target that they were counted for, however its vocabulary is padded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from specgym.decoding import AutoregressiveDecoder, NGramDrafter, SpeculativeDecoder, load_pair
from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft.ngram import NGramSettings, make_ngram
from specgym.decoding.fit.text.corpus_text import read_plain
from tests.helpers.counting import counting_model

PADDING = 7


@pytest.fixture
def padded(counting_folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """`counting_folder` with a target whose layers have more rows than its tokenizer has tokens."""
    counting_model(len(tokenizer) + PADDING).save_pretrained(counting_folder / "target")
    return counting_folder


def test_a_table_drafts_for_the_padded_target_that_it_was_counted_for(
    padded: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    table = padded / "table.safetensors"
    make_ngram(NGramSettings(str(padded / "target"), table, text=(padded / "notes.txt",)))
    assert NGramDrafter.load(table).vocabulary_size == len(tokenizer) + PADDING
    pair = load_pair(f"{padded / 'target'}+{table}", offline=True)
    expected = AutoregressiveDecoder(pair.without_draft()).generate("the draft", max_new_tokens=8)
    assert SpeculativeDecoder(pair).generate("the draft", max_new_tokens=8).tokens == expected.tokens


def test_a_table_of_the_tokenizers_size_serves_it_too(padded: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [tokenizer(passage.text)["input_ids"] for passage in read_plain((padded / "notes.txt",))]
    NGramDrafter.fit(texts, len(tokenizer)).save(padded / "old.safetensors")
    pair = load_pair(f"{padded / 'target'}+{padded / 'old.safetensors'}", offline=True)
    generation = SpeculativeDecoder(pair).generate("the draft model", max_new_tokens=8)
    assert sum(round_.drafted for round_ in generation.rounds) > 0


def test_an_order_that_is_too_large_is_refused_before_any_text_is_read(padded: Path) -> None:
    settings = NGramSettings(str(padded / "target"), padded / "t.safetensors", text=(padded / "missing",), order=9)
    with pytest.raises(FitError, match="--order: order must be 2 to 8 for a vocabulary of"):
        make_ngram(settings)
