"""The text of one fit: tokens to train on, held-out tokens by domain, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .corpus import held_out
from .errors import FitError
from .text import pack, read_documents, read_plain, shuffled, token_digest, tokenise


@dataclass(frozen=True)
class Data:
    """Tokens of one fit.

    Attributes:
        train: all domains mixed, shape (n,), int32.
        domains: the same by domain, in the order of the documents, shape (m,), int32.
        held_out: for each domain its held-out tokens, shape (m,), int32.
        sources: lines that say where the text comes from, under what licence, and its digest.
    """

    train: np.ndarray
    domains: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    sources: list[str]


def load_data(tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], seed: int) -> Data:
    """Tokens of a corpus folder, or of plain text if any is given.

    Args:
        tokenizer: of the model to train.
        corpus: folder written by the corpus command; used if ``text`` is empty.
        text: files and folders of text; each is a domain of its own.
        seed: of the order of documents.

    Raises:
        FileNotFoundError: if there is no text.
        FitError: if there is too little to hold some out.
    """
    if text:
        documents = read_plain(text)
        kept = _hold_out(documents)
        train = [row for row in documents if row[1] not in kept]
        held = [row for row in documents if row[1] in kept]
        sources = [f"{path.name}; licence not stated" for path in text]
    else:
        train = read_documents(corpus, "train")
        held = read_documents(corpus, "held-out")
        sources = _corpus_sources(corpus)
    tokenised = tokenise(tokenizer, [row[2] for row in train])
    tokens = shuffled(tokenised, seed)
    domains = {
        domain: np.concatenate([ids for ids, row in zip(tokenised, train, strict=True) if row[0] == domain])
        for domain in {row[0] for row in train}
    }
    rows = {
        domain: pack(tokenizer, [row[2] for row in held if row[0] == domain]) for domain in {row[0] for row in held}
    }
    return Data(
        tokens, domains, rows, [*sources, f"training tokens: {len(tokens):,}, SHA-256 `{token_digest(tokens)}`"]
    )


def _hold_out(documents: list[tuple[str, str, str]]) -> set[str]:
    """Names to hold out: those that the hash chooses, and one at least of every domain."""
    kept = set[str]()
    for domain in {row[0] for row in documents}:
        names = [row[1] for row in documents if row[0] == domain]
        if len(names) < 2:
            raise FitError(f"the text {domain!r} is too short to hold some of it out: give more than 8000 characters")
        chosen = [name for name in names if held_out(name)]
        kept.update(chosen[: len(names) - 1] or names[-1:])
    return kept


def _corpus_sources(corpus: Path) -> list[str]:
    manifest = corpus / "corpus.json"
    if not manifest.is_file():
        return [f"{corpus.name}; licence not stated"]
    found = json.loads(manifest.read_text(encoding="utf-8"))
    return [f"{domain}: {entry['source']}; SHA-256 `{entry['digest']}`" for domain, entry in found.items()]
