"""Prompts for a target to continue: windows of documents, of every domain, some kept apart from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data import load_data
from .errors import FitError

TRAINING, JUDGING, SPEED = 0, 1, 2
"""What a text is for: training; early stopping and accuracies; measuring the speed. Only the first is trained on.

Prompts of the three come from different documents (or parts of one, where few are held out), so that what training is
stopped by does not flatter the speed.
"""
_KEPT_APART = 0.1


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order in which they are continued.

    Attributes:
        rows: token ids of each.
        domain: of each its place among ``domains``, shape (n,), int64.
        side: of each `TRAINING`, `JUDGING` or `SPEED`, shape (n,), int64.
        domains: names.
        sources: lines that say where the text comes from.
        held_out: by domain the tokens of the documents that no prompt of `TRAINING` is cut from, shape (m,), int32.
        trained: by domain those of the documents that the prompts of `TRAINING` are cut from, likewise.
    """

    rows: list[list[int]]
    domain: np.ndarray
    side: np.ndarray
    domains: tuple[str, ...]
    sources: list[str]
    held_out: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def cut_windows(tokens: np.ndarray, count: int, longest: int, eos: int, rng: np.random.Generator) -> list[list[int]]:
    """Windows that begin anywhere within a document, of half to the whole of the longest length.

    Args:
        tokens: documents, each followed by ``eos``, shape (n,).
        count: how many windows.
        longest: most tokens of one.
        eos: the separator, which is in none of them.
        rng: chooses places and lengths.

    Raises:
        FitError: there are not so many places.
    """
    ended = np.concatenate([[0], np.cumsum(tokens == eos)])
    starts = np.flatnonzero(ended[longest:] == ended[:-longest])
    if len(starts) < count:
        raise FitError(
            f"the text has {len(starts)} places for prompts of {longest} tokens within a document, and {count} are "
            "needed: give more text, a smaller --prompt-tokens, or fewer --texts"
        )
    chosen = rng.choice(starts, count, replace=False)
    lengths = rng.integers(max(2, longest // 2), longest + 1, count)
    return [tokens[start : start + length].tolist() for start, length in zip(chosen, lengths, strict=True)]


def cut_prompts(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], texts: int, longest: int, seed: int
) -> Prompts:
    """Prompts of a corpus folder, or of plain text if any is given; as many of each domain, in a random order.

    A tenth is kept apart, and cut from documents that the others do not come from (and that the targets which this
    package makes were not trained on). One part of it is for `JUDGING`, another for `SPEED`.

    Args:
        tokenizer: of the target.
        corpus: folder written by the corpus command; used if ``text`` is empty.
        text: files and folders of text; each is a domain of its own.
        texts: how many prompts in all, those kept apart included.
        longest: most tokens of one.
        seed: of every choice.

    Raises:
        FileNotFoundError: there is no text.
        FitError: there is too little of it, or ``texts`` is too small for its domains.
    """
    trained, kept, sources = _documents(tokenizer, corpus, text, seed)
    domains = tuple(sorted(trained))
    if texts < 4 * len(domains):
        raise FitError(f"--texts {texts} is too few for {len(domains)} domains: give at least {4 * len(domains)}")
    rng = np.random.default_rng(seed)
    rows, places, sides = list[list[int]](), list[int](), list[int]()
    for place, domain in enumerate(domains):
        count = texts // len(domains) + (place < texts % len(domains))
        apart = max(2, round(_KEPT_APART * count))
        rows += cut_windows(trained[domain], count - apart, longest, _eos(tokenizer), rng)
        judging, speed = halves(kept[domain], _eos(tokenizer))
        rows += cut_windows(judging, apart - apart // 2, longest, _eos(tokenizer), rng)
        rows += cut_windows(speed, apart // 2, longest, _eos(tokenizer), rng)
        places += [place] * count
        sides += [TRAINING] * (count - apart) + [JUDGING] * (apart - apart // 2) + [SPEED] * (apart // 2)
    order = rng.permutation(len(rows))
    return Prompts(
        [rows[n] for n in order], np.array(places)[order], np.array(sides)[order], domains, sources, kept, trained
    )  # fmt: skip


def halves(tokens: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Every second document, and the others; where there are fewer than four, the first and the second half.

    Args:
        tokens: documents, each followed by ``eos``, shape (n,).
        eos: the separator.
    """
    documents = np.split(tokens, np.flatnonzero(tokens[:-1] == eos) + 1)
    if len(documents) < 4:
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    # Not the first and the second half: neighbours are often of one source.
    return np.concatenate(documents[::2]), np.concatenate(documents[1::2])


def _documents(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """By domain the tokens to train on and those kept apart, and lines on where they come from."""
    if not text:
        data = load_data(tokenizer, corpus, (), seed)
        if data.domains.keys() != data.held_out.keys():
            raise FitError(f"a domain of {corpus} has no documents to train on or none held out: collect more text")
        return data.domains, data.held_out, data.sources
    trained, kept, sources = dict[str, np.ndarray](), dict[str, np.ndarray](), list[str]()
    for path in text:
        if path.stem in trained:
            raise FitError(f"two of the texts are called {path.stem!r}, which names a domain: rename one")
        data = load_data(tokenizer, corpus, (path,), seed)
        trained[path.stem], kept[path.stem] = data.train, data.held_out[path.stem]
        sources += data.sources
    return trained, kept, sources


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int)  # or the documents could not have been packed
    return tokenizer.eos_token_id
