"""Checksums and bounds of files: what is declared is compared with what is there before memory is set aside."""

from __future__ import annotations

import json
import re
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.decoding import (
    DamagedFileError,
    NGramDrafter,
    check_files,
    file_digests,
    read_arrays,
    read_sealed,
    write_arrays,
    write_sealed,
)
from specgym.decoding.loading.checkpoint import load_checkpoint, save_checkpoint
from specgym.decoding.loading.link import CheckpointError
from tests.helpers.sealing import reseal

LARGEST_GROWTH = 400_000
"""Kilobytes by which the most memory ever used may grow while a file is refused."""


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def test_an_object_comes_back_and_one_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"format": "a-2", "numbers": [1, 2.5, float("nan")], "name": "\u00e9"}
    write_sealed(path, content)
    assert json.dumps(read_sealed(path, "a-2")) == json.dumps(content)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("2.5", "2.6"), encoding="utf-8")
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        read_sealed(path, "a-2")
    path.write_text(whole.replace("sha256", "sha255"), encoding="utf-8")
    with pytest.raises(DamagedFileError, match="checksum is missing"):
        read_sealed(path, "a-2")
    for text, message in (("[1]", "holds a list"), ("[" * 100_000, "holds no JSON"), ("{", "holds no JSON")):
        path.write_text(text)
        with pytest.raises(DamagedFileError, match=message):
            read_sealed(path)


def test_an_object_of_an_earlier_format_needs_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"format": "a-1", "number": 1}')
    assert read_sealed(path, "a-2") == {"format": "a-1", "number": 1}


def test_arrays_come_back_and_one_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.zeros((0, 3), np.int8),
        "c": np.array("text"),
        "d": np.array(3),
    }
    write_arrays(path, arrays)
    back, sealed = read_arrays(path)
    assert sealed
    assert list(back) == list(arrays)
    assert all(back[name].dtype == array.dtype and np.array_equal(back[name], array) for name, array in arrays.items())
    stored = dict(np.load(path))
    np.savez(path, **{**stored, "d": np.array(4)})
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        read_arrays(path)


def test_a_file_that_a_description_lists_is_compared_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    description = {"files": file_digests(tmp_path, ["a"])}
    check_files(tmp_path, description, "a")
    check_files(tmp_path, {}, "a")  # of an earlier version
    (tmp_path / "b").touch()
    with pytest.raises(DamagedFileError, match="b is damaged: its checksum is missing"):
        check_files(tmp_path, description, "a", "b")
    (tmp_path / "a").write_bytes(b"two")
    with pytest.raises(DamagedFileError, match=re.escape(f"{tmp_path / 'a'} is damaged")):
        check_files(tmp_path, description)


def archive_of(path: Path, members: list[tuple[str, bytes]], packed: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def array_bytes(kind: str, shape: str, values: bytes = b"") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.npy", array_bytes("<f8", "(10000000000000,)"))], r"declared as <f8 of shape \(10000000000000,\)"),
        ([("a.npy", array_bytes("<f8", "(2,)", bytes(8)))], "'a' is declared as"),
        ([("a.npy", array_bytes("|u1", "(400000000,)", bytes(400_000_000)))], "would unpack to 400000128"),
        ([("a.npy", array_bytes("|O", "(1,)", bytes(8)))], "something else than numbers"),
        ([("a.npy", array_bytes("<U0", "(99999999999,)"))], "values of no size"),
        ([("a.npy", array_bytes("<f3", "(1,)", bytes(3)))], "a type that is none"),
        ([("a.npy", array_bytes("<f8", "(1,)", bytes(8)))] * 2, "it has 'a.npy' twice"),
        ([("a.txt", b"x")], "is no array"),
        ([("a.npy", b"x")], "is no array"),
    ],
)
def test_an_archive_that_declares_what_it_does_not_hold_is_refused_before_memory_is_set_aside(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = archive_of(tmp_path / "a.npz", members)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedFileError, match=message):
        read_arrays(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < LARGEST_GROWTH


def test_archives_packed_in_other_ways_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.npz", [("a.npy", array_bytes("|u1", "(1,)", b"x"))], zipfile.ZIP_LZMA)
    with pytest.raises(DamagedFileError, match="packed in a way"):
        read_arrays(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2000},
        {"num_labels": 5000},
        {"vocab_size": 10**6},
        {"max_position_embeddings": -(10**15)},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"layer_types": ["nonsense"]},
        {"model_type": "nonsense", "auto_map": {"AutoConfig": "code.Config"}},
    ],
    ids=str,
)
def test_a_configuration_beyond_all_reason_is_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_checkpoint(tiny_llama(), tmp_path, card="")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    reseal(tmp_path / "specgym.json")
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} cannot be used"):
        load_checkpoint(tmp_path)


def test_ids_above_the_vocabulary_are_refused_in_a_table(tmp_path: Path) -> None:
    table = NGramDrafter(50, [np.arange(3)], [np.array([1, 2, 50], np.int32)])
    table.save(tmp_path / "n.safetensors")
    with pytest.raises(DamagedFileError, match=r"n\.safetensors is damaged \(tokens1 has ids outside"):
        NGramDrafter.load(tmp_path / "n.safetensors")
