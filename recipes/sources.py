"""Readers of freely licensed text: the King James Bible, computing dictionaries, Python's standard library."""

from __future__ import annotations

import gzip
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_CHAPTER = re.compile(r"^(\S.*) (\d+)$")
_VERSE = re.compile(r"^ +(\d+) (.*)$")
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"
}  # fmt: skip
_GENERATED = re.compile(r"auto-?generated|generated (automatically|by|from)|do not edit", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """A piece of text that stands for itself.

    Attributes:
        name: its origin, for example ``foldoc/pipeline``.
        key: decides its side of the split; documents that may repeat each other share a key.
        text: the text, with no blank space around it.
    """

    name: str
    key: str
    text: str


def read_bible(root: Path) -> Iterator[Document]:
    """Chapters of the King James Bible, one verse a line, from an unpacked ``bible-kjv`` and ``bible-kjv-text``.

    Args:
        root: the folder that holds ``usr/bin/bible`` and ``usr/lib/bible.data``.

    Raises:
        FileNotFoundError: if either is missing.
    """
    program, data = root / "usr/bin/bible", root / "usr/lib/bible.data"
    for path in (program, data):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: unpack the Debian packages bible-kjv and bible-kjv-text there")
    # The program looks for its data along a path of folders, and takes no absolute name.
    command = [str(program.resolve()), "-d", "usr/lib/bible.data", "-l9999", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, cwd=root).stdout
    title, verses = "", list[str]()
    for line in printed.decode("utf-8", "replace").splitlines():
        if verse := _VERSE.match(line):
            verses.append(verse[2].strip())
        elif chapter := _CHAPTER.match(line):
            if verses:
                yield _chapter(title, verses)
            title, verses = chapter[0], []
    if verses:
        yield _chapter(title, verses)


def _chapter(title: str, verses: list[str]) -> Document:
    return Document(f"bible/{title}", title.lower(), f"{title}\n\n" + "\n".join(verses))


def read_dictionary(root: Path, name: str) -> Iterator[Document]:
    """Entries of a dictionary in dictd's format, from an unpacked ``dict-<name>``.

    Args:
        root: the folder that holds ``usr/share/dictd/<name>.dict.dz`` and ``<name>.index``.
        name: ``foldoc`` or ``jargon``.

    Raises:
        FileNotFoundError: if either file is missing.
    """
    data, index = (root / "usr/share/dictd" / f"{name}.{suffix}" for suffix in ("dict.dz", "index"))
    for path in (data, index):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: unpack the Debian package dict-{name} there")
    content = gzip.decompress(data.read_bytes())
    # Several headwords may point at one entry, and entries may overlap in no other way: keep each place once.
    places = dict[tuple[int, int], str]()
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        headword, start, size = line.split("\t")[:3]
        if not headword.startswith("00-database"):
            places.setdefault((_number(start), _number(size)), headword)
    for (first, length), headword in sorted(places.items()):
        text = content[first : first + length].decode("utf-8", "replace")
        text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
        if text:
            title = text.partition("\n")[0].partition("%%%")[0].strip()
            # The two dictionaries quote each other: the same headword goes to the same side of the split.
            yield Document(f"{name}/{title or headword}", (title or headword).lower(), text)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


def read_python(root: Path | None = None) -> Iterator[Document]:
    """Modules of Python's standard library: no tests, no tables, nothing generated.

    Args:
        root: a folder of Python sources; None for the running interpreter's own library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & _SKIPPED_FOLDERS or relative.name.startswith("_sysconfigdata"):
            continue
        if any(folder.startswith("config-") for folder in folders):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = "\n".join(line.rstrip() for line in text.expandtabs(4).splitlines()).strip()
        # No module may outweigh the others, and what is too short to be code (empty packages) teaches nothing.
        if 200 <= len(text) <= 80_000 and not _GENERATED.search(text[:600]):
            yield Document(f"python/{relative.as_posix()}", relative.as_posix(), text)
