"""Collect the corpus: documents of three domains, split into training and held-out by a hash of their names."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from specgym.decoding.errors import SpecgymError
from specgym.decoding.files import digest, replacing, write_json
from specgym.decoding.fit.text.corpus_text import held_out, unit_hash

from . import run
from .sources import Document, read_bible, read_dictionary, read_python

DOMAINS = ("prose", "code", "definitions")
PACKAGES = ("bible-kjv", "bible-kjv-text", "dict-foldoc", "dict-jargon")
LICENCES = {
    "prose": "King James Version of the Bible (Debian: bible-kjv-text); public domain",
    "code": "Python standard library; Python Software Foundation Licence, version 2",
    "definitions": (
        "Free On-line Dictionary of Computing (Debian: dict-foldoc), Copyright 1993 Denis Howe, GNU Free Documentation "
        "Licence 1.1 or later with no invariant sections; Jargon File 4.4.7 (Debian: dict-jargon), public domain"
    ),
}


class CorpusError(SpecgymError, RuntimeError):
    """Text cannot be collected; the message names another way to get it."""


@dataclass
class CorpusSettings:
    """Collect freely licensed text of three domains: prose, code, definitions.

    The prose is the King James Bible and the definitions are two dictionaries of computing, all from Debian packages;
    the code is the standard library of the Python that runs this command. Documents are kept whole and split into
    training and held-out by a hash of their names, so the split does not change when others are added.
    """

    out: Path = Path("runs/corpus")
    """Folder to write: <domain>.jsonl (one document a line) and corpus.json (sizes, licences, digests)."""
    unpacked: Path | None = None
    """Folder that contains usr/ of the unpacked Debian packages bible-kjv, bible-kjv-text, dict-foldoc and dict-jargon.
    Default: download them with apt-get, which needs Debian or a relative of it."""
    python: Path | None = None
    """Folder of Python sources to use instead of the running interpreter's standard library."""
    megabytes: float = 5.0
    """Most text of a domain, in millions of bytes; a hash decides which documents stay."""


def limit(documents: Iterable[Document], megabytes: float) -> list[Document]:
    """The documents, in their order, without those that a hash drops to stay within ``megabytes``."""
    documents = list(documents)
    kept, size = set[int](), 0
    for index in sorted(range(len(documents)), key=lambda i: (unit_hash(documents[i].name, "limit"), i)):
        length = len(documents[index].text.encode())
        if size + length <= megabytes * 1e6:
            kept.add(index)
            size += length
    return [document for index, document in enumerate(documents) if index in kept]


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Download Debian packages and unpack them into ``folder``; nothing is installed.

    Raises:
        CorpusError: if apt-get or dpkg is missing or fails; the message says what to do instead.
    """
    advice = (
        f"Download the Debian packages {', '.join(packages)} by other means (they contain data and one small program), "
        "unpack each with 'dpkg -x PACKAGE.deb FOLDER' or 'ar' and 'tar', and pass --unpacked FOLDER."
    )
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise CorpusError(f"'{program}' was not found. {advice}")
    with tempfile.TemporaryDirectory() as downloads:
        # apt drops its rights to another user, who must be able to write here.
        Path(downloads).chmod(0o777)
        done = subprocess.run(["apt-get", "download", *packages], cwd=downloads, capture_output=True, text=True)
        if done.returncode != 0:
            raise CorpusError(f"'apt-get download' failed: {done.stderr.strip()} (is 'apt-get update' due?) {advice}")
        for archive in sorted(Path(downloads).glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)


def write_corpus(documents: dict[str, list[Document]], out: Path, notes: dict[str, str]) -> dict[str, object]:
    """Write documents by domain, and a manifest.

    Args:
        documents: documents by domain.
        out: the folder.
        notes: source and licence by domain.

    Returns:
        The manifest: number of documents and bytes by domain and side, and a digest of every domain.
    """
    manifest: dict[str, object] = {}
    for domain, members in documents.items():
        with replacing(out / f"{domain}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for document in members:
                side = "held-out" if held_out(document.key) else "train"
                row = {"name": document.name, "split": side, "text": document.text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        sides = {
            side: [d for d in members if held_out(d.key) == (side == "held-out")] for side in ("train", "held-out")
        }
        manifest[domain] = {
            "source": notes[domain],
            "digest": digest(part for document in members for part in (document.name, document.text)),
            **{
                side: {"documents": len(part), "bytes": sum(len(d.text.encode()) for d in part)}
                for side, part in sides.items()
            },
        }
    write_json(out / "corpus.json", manifest)
    return manifest


def make_corpus(settings: CorpusSettings) -> None:
    """Collect the corpus.

    Raises:
        CorpusError: the text cannot be downloaded.
        FileNotFoundError: the folder of unpacked packages lacks a file.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        root = settings.unpacked
        if root is None:
            root = Path(scratch)
            console.print(f"downloading {', '.join(PACKAGES)}")
            unpack(PACKAGES, root)
        documents = {
            "prose": limit(read_bible(root), settings.megabytes),
            "code": limit(read_python(settings.python), settings.megabytes),
            "definitions": limit(
                [*read_dictionary(root, "foldoc"), *read_dictionary(root, "jargon")], settings.megabytes
            ),
        }
    notes = dict(LICENCES)
    if settings.python is None:
        notes["code"] = notes["code"].replace("library;", f"library of Python {platform.python_version()};")
    manifest = write_corpus(documents, settings.out, notes)
    console.print_json(json.dumps(manifest))
    console.print(f"wrote {settings.out}")


if __name__ == "__main__":
    run("corpus", CorpusSettings, make_corpus)
