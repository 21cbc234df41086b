"""Documents of a corpus as tokens: the split, separators, windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from specgym.decoding.errors import FitError
from specgym.decoding.fit.text.corpus_text import Windows, held_out, read_plain, shuffled, tokenise


def test_the_split_of_a_document_never_changes() -> None:
    assert [i for i in range(40) if held_out(f"document {i}")] == [1, 10, 31, 35]


def test_a_byte_order_mark_is_no_text_and_other_separators_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes("\ufeffone\u2028still one\x0c\r\ntwo".encode())
    assert [passage.text.strip() for passage in read_plain([tmp_path])] == ["one\u2028still one\x0c\ntwo"]


def test_documents_are_separated_and_shuffled_by_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tokenise(tokenizer, ["the draft", "a model"])
    assert tokenizer.decode(np.concatenate(rows)) == "the draft<|endoftext|>a model<|endoftext|>"
    rows = tokenise(tokenizer, [str(i) for i in range(9)])
    orders = [shuffled(rows, seed) for seed in (1, 1, 2)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert sorted(orders[2].tolist()) == sorted(np.concatenate(rows).tolist())


def test_windows_depend_on_the_step_alone_and_cover_an_epoch() -> None:
    windows, other = (Windows(np.arange(1000, dtype=np.int32), 4, 10, seed=3) for _ in range(2))
    later = windows(30)
    assert torch.equal(other(5), windows(5))
    assert torch.equal(other(30), later)
    starts = torch.cat([windows(step)[:, 0] for step in range(windows.per_epoch)])
    assert len(starts.unique()) == len(starts) == windows.per_epoch * 4
    assert ((starts - starts[0]) % 10 == 0).all()
    assert torch.equal(later[:, 1:], later[:, :-1] + 1)
    with pytest.raises(FitError, match="too few"):
        Windows(np.arange(50), 4, 16, seed=0)
