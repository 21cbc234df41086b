"""Files that are written whole or not at all, on full disks and beside what killed processes left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from specgym.decoding.errors import io_message
from specgym.decoding.files import remove_leftovers, replacing, write_text


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process become larger, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_by_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    write_text(path, "earlier")
    with largest_file(1000), pytest.raises(OSError, match="File too large") as text:
        write_text(path, "x" * 2000)
    with largest_file(1000), pytest.raises(OSError, match="File too large") as weights, replacing(path) as temporary:
        torch.save(torch.zeros(9000), temporary)  # says it in an error of its own
    for refused in (text, weights):
        assert refused.value.errno == errno.EFBIG
        assert io_message(refused.value) == f"{path}: File too large"
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_errors_of_other_files_and_other_kinds_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, replacing(tmp_path / "copy"):
        (tmp_path / "nothing").read_bytes()
    assert missing.value.filename == str(tmp_path / "nothing")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "copy"):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("name", ["é" * 127, "[a].json"])
def test_any_name_that_fits_a_folder_can_be_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


def test_leftovers_of_killed_writers_go_and_files_being_written_stay(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom specgym.decoding.files import replacing\n"
        "writing = [replacing(Path(sys.argv[1], 'inner', name)) for name in ('a.json', 'b.json')]\n"
        "for file in writing:\n    file.__enter__()\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    inner = tmp_path / "inner"
    theirs = [inner / ".hidden.tmp", inner / "notes.txt.abcdefgh.tmp"]
    for path in theirs:
        path.write_text("of somebody else")
    assert len(list(inner.iterdir())) == 4
    write_text(inner / "a.json", "{}")  # takes its own with it
    assert len(list(inner.glob(".b.json.*.tmp"))) == 1
    assert not list(inner.glob(".a.json.*"))
    with replacing(inner / "c.json") as temporary:
        remove_leftovers(tmp_path)
        assert temporary.is_file()
        temporary.write_text("[]")
    assert sorted(inner.iterdir()) == sorted([*theirs, inner / "a.json", inner / "c.json"])
