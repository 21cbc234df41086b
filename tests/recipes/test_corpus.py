"""The corpus recipe: sources, limits, the split, and the way out without apt-get."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from recipes.corpus import limit, unpack, write_corpus
from recipes.sources import Document, read_dictionary, read_python
from specgym.decoding.fit.text.corpus_text import held_out, read_documents
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
    with pytest.raises(FileNotFoundError, match=r"recipes\.corpus"):
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
