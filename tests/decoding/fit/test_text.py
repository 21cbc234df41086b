"""Text for fitting: the corpus and its split, tokens, windows, prompt sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from specgym.decoding.fit.corpus import held_out, limit, unpack, write_corpus
from specgym.decoding.fit.prompts import choose, cut_prompts
from specgym.decoding.fit.sources import Document, read_dictionary, read_python
from specgym.decoding.fit.text import Windows, pack, read_documents, shuffled, tokenise
from tests.helpers.counting import words


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of three domains, written as the command writes it."""
    documents = {
        domain: [Document(f"{domain}/{i}", f"{domain} {i}", words(300, i)) for i in range(30)]
        for domain in ("prose", "code", "definitions")
    }
    write_corpus(documents, tmp_path / "corpus", {domain: f"{domain}; free" for domain in documents})
    return tmp_path / "corpus"


def test_the_split_of_a_document_never_changes() -> None:
    assert [i for i in range(40) if held_out(f"document {i}")] == [1, 10, 31, 35]


def test_a_limit_keeps_order_and_does_not_depend_on_later_documents() -> None:
    documents = [Document(f"d{i}", f"d{i}", "x" * 100) for i in range(20)]
    kept = limit(documents, 1000 / 1e6)
    assert len(kept) == 10
    assert kept == [document for document in documents if document in kept]
    assert limit(documents, 1) == documents


def test_a_corpus_is_read_back_by_side(corpus: Path) -> None:
    train_side, held_side = read_documents(corpus, "train"), read_documents(corpus, "held-out")
    assert len(train_side) + len(held_side) == 90
    assert not {name for _, name, _ in train_side} & {name for _, name, _ in held_side}
    assert all(held_out(name.replace("/", " ")) for _, name, _ in held_side)
    manifest = json.loads((corpus / "corpus.json").read_text())
    assert manifest["prose"]["train"]["documents"] + manifest["prose"]["held-out"]["documents"] == 30
    with pytest.raises(FileNotFoundError, match="fit corpus"):
        read_documents(corpus / "nowhere", "train")


def test_without_apt_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(RuntimeError, match=r"'apt-get' was not found.*--unpacked FOLDER"):
        unpack(["bible-kjv"], tmp_path)


def test_a_dictionary_is_read_through_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = ["00-database-info\n  about\n", "ack\n\n   Yes.\n", "nak\nnack\n\n   No.\n"]
    (folder / "toy.dict.dz").write_bytes(gzip.compress("".join(entries).encode()))
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    ends = np.cumsum([len(entry) for entry in entries])
    places = [f"{digits[end - len(e)]}\t{digits[len(e)]}" for end, e in zip(ends, entries, strict=True)]
    rows = [f"00-database-info\t{places[0]}", f"nack\t{places[2]}", f"ack\t{places[1]}", f"nak\t{places[2]}"]
    (folder / "toy.index").write_text("\n".join(rows) + "\n")
    assert list(read_dictionary(tmp_path, "toy")) == [
        Document("toy/ack", "ack", "ack\n\n   Yes."),
        Document("toy/nak", "nak", "nak\nnack\n\n   No."),
    ]
    with pytest.raises(FileNotFoundError, match="dict-other"):
        list(read_dictionary(tmp_path, "other"))


def test_code_leaves_out_tests_and_generated_files(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "idlelib/c.py", "pack/d.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1  \n" * 60)
    (tmp_path / "made.py").write_text("# Auto-generated, hands off\n" + "x = 1\n" * 60)
    assert [document.name for document in read_python(tmp_path)] == ["python/a.py", "python/pack/d.py"]


def test_the_tokenizer_gives_text_back_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f( x ):\n\treturn  x  # é ☃\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_documents_are_packed_with_a_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    row = pack(tokenizer, ["the draft", "a model"])
    assert tokenizer.decode(row) == "the draft<|endoftext|>a model<|endoftext|>"
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
    with pytest.raises(ValueError, match="too few"):
        Windows(np.arange(50), 4, 16, seed=0)


def test_code_prompts_start_at_definitions_and_end_lines() -> None:
    text = "import os\n\n\n" + "".join(
        f"def function_{i}(a, b):\n    first = a + b\n    second = a - b\n    return first, second\n\n\n"
        for i in range(20)
    )
    prompts = cut_prompts("code", text, lambda part: len(part.split()), (6, 16), "seed")
    assert len(prompts) > 3
    assert prompts == cut_prompts("code", text, lambda part: len(part.split()), (6, 16), "seed")
    for prompt in prompts:
        assert prompt.startswith("def function_")
        assert text[text.index(prompt) + len(prompt)] == "\n"
        assert 6 <= len(prompt.split()) <= 16


def test_prompts_hold_no_addresses() -> None:
    text = "entry\n\n" + "a word of it " * 10 + "someone@example.org " + "and more words " * 40
    assert cut_prompts("definitions", text, lambda part: len(part.split()), (45, 60), "seed") == []


def test_prompts_are_taken_from_every_document_in_turn() -> None:
    candidates = {"a": ["1", "2", "3"], "b": ["4"], "c": ["5", "1"]}
    assert choose(candidates, 4) == ["1", "4", "5", "2"]
    with pytest.raises(ValueError, match="only 5 prompts of 6"):
        choose(candidates, 6)
