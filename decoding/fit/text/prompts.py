"""Prompts for the target to continue: windows of documents, or prompt sets; a part of them is held out.

Sources for a target with an encoder to read: prompt sets, or the lines or paragraphs of text files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import FitError
from ...loading.prompt_tokens import encode
from ...prompts import PromptSet, load_prompts, pieces
from .corpus_text import load_tokens, texts_of

TRAINING, JUDGING, SPEED = 0, 1, 2
"""Purpose of a text: training; early stopping and accuracies; measuring the speed. Only the first is trained on.

Prompts of the three come from different documents (or parts of one, if few are held out), so that early stopping does
not flatter the speed.
"""
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Prompts:
    """Prompts, or sources for an encoder, in the order in which they are continued.

    Attributes:
        rows: token ids of each prompt.
        domain: index of each prompt's domain in ``domains``, shape (n,), int64.
        side: purpose of each prompt, `TRAINING`, `JUDGING` or `SPEED`, shape (n,), int64.
        domains: names.
        sources: lines on the origin of the text.
        held_out: tokens, by domain, of the documents that no prompt of `TRAINING` is cut from, shape (m,), int32.
        trained: tokens, by domain, of the documents that the prompts of `TRAINING` are cut from, likewise.
    """

    rows: list[list[int]]
    domain: np.ndarray
    side: np.ndarray
    domains: tuple[str, ...]
    sources: list[str]
    held_out: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]

    def count(self, side: int) -> int:
        """Number of prompts of one side."""
        return int((self.side == side).sum())

    def by_length(self) -> Prompts:
        """These prompts, the shortest first, so that batches have little padding."""
        order = np.argsort([len(row) for row in self.rows], kind="stable")
        rows = [self.rows[number] for number in order]
        return replace(self, rows=rows, domain=self.domain[order], side=self.side[order])

    def of_side(self, side: int) -> dict[str, list[list[int]]]:
        """Prompts of one side by domain."""
        chosen = ((self.side == side) & (self.domain == number) for number in range(len(self.domains)))
        return {
            domain: [self.rows[number] for number in np.flatnonzero(members)]
            for domain, members in zip(self.domains, chosen, strict=True)
        }


def cut_windows(tokens: np.ndarray, count: int, longest: int, eos: int, rng: np.random.Generator) -> list[list[int]]:
    """Cut windows that begin anywhere within a document, of half to all of the longest length.

    Args:
        tokens: documents, each followed by ``eos``, shape (n,).
        count: number of windows.
        longest: most tokens of a window.
        eos: the separator, which no window contains.
        rng: chooses places and lengths.

    Raises:
        FitError: there are fewer places than windows.
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


def halves(tokens: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide documents, each followed by ``eos``, in two: every second one, and the others.

    Fewer than four documents, shape (n,), are cut in the middle.
    """
    documents = np.split(tokens, np.flatnonzero(tokens[:-1] == eos) + 1)
    if len(documents) < 4:
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    # Not the first and the second half: neighbours are often of one source.
    return np.concatenate(documents[::2]), np.concatenate(documents[1::2])


def cut_prompts(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], texts: int, longest: int, seed: int
) -> Prompts:
    """Cut prompts from a corpus folder, or from plain text if any is given; equally many of each domain.

    A tenth is held out, and cut from documents that the others do not come from (and that the shipped targets were not
    trained on). One half of it is for `JUDGING`, the other for `SPEED`.

    Args:
        tokenizer: tokeniser of the target.
        corpus: folder of the corpus; used if ``text`` is empty.
        text: files and folders of text, each a domain.
        texts: number of prompts, those held out included.
        longest: most tokens of a prompt.
        seed: seed of every choice.

    Raises:
        FileNotFoundError: there is no text.
        FitError: there is too little of it, or ``texts`` is too small for its domains.
    """
    trained, held, sources = _documents(tokenizer, corpus, text, seed)
    domains = tuple(sorted(trained))
    if texts < 4 * len(domains):
        raise FitError(f"--texts {texts} is too few for {len(domains)} domains: give at least {4 * len(domains)}")
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)  # or the documents could not have been separated
    rng = np.random.default_rng(seed)
    rows, places, sides = list[list[int]](), list[int](), list[int]()
    for place, domain in enumerate(domains):
        count = texts // len(domains) + (place < texts % len(domains))
        held_out = max(2, round(_HELD_OUT * count))
        judging, speed = halves(held[domain], eos)
        parts = ((trained[domain], count - held_out), (judging, held_out - held_out // 2), (speed, held_out // 2))
        for side, (tokens, number) in enumerate(parts):
            rows += cut_windows(tokens, number, longest, eos, rng)
            sides += [side] * number
        places += [place] * count
    order = rng.permutation(len(rows))
    domain_of, side_of = np.array(places)[order], np.array(sides)[order]
    return Prompts([rows[n] for n in order], domain_of, side_of, domains, sources, held, trained)


def _documents(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Tokens to train on and held-out tokens by domain, and lines on their origin."""
    if not text:
        data = load_tokens(tokenizer, corpus, (), seed)
        if data.domains.keys() != data.held_out.keys():
            raise FitError(f"a domain of {corpus} has no documents to train on or none held out: collect more text")
        return data.domains, data.held_out, data.sources
    trained, held, sources = dict[str, np.ndarray](), dict[str, np.ndarray](), list[str]()
    for path in text:
        if path.stem in trained:
            raise FitError(f"two of the texts are called {path.stem!r}, which names a domain: rename one")
        data = load_tokens(tokenizer, corpus, (path,), seed)
        trained[path.stem], held[path.stem] = data.train, data.held_out[path.stem]
        sources += data.sources
    return trained, held, sources


def line_sources(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[Path], count: int, longest: int, seed: int
) -> Prompts:
    """Sources for an encoder from text files: of each file its paragraphs if blank lines separate any, else its lines.

    A tenth is held out, one half of it for `JUDGING`, the other for `SPEED`. What comes twice in a domain counts once.

    Args:
        tokenizer: tokeniser of the target.
        text: files and folders of text, each a domain.
        count: number of sources, at most, those held out included; equally many of each domain.
        longest: most tokens of a source; what is longer is left out, because a part of it would be another source.
        seed: seed of every choice.

    Raises:
        FileNotFoundError: there is no text.
        FitError: a domain has fewer than four sources, or two domains have the same name.
    """
    rng, domains = np.random.default_rng(seed), tuple(path.stem for path in text)
    rows, places, sides, sources = list[list[int]](), list[int](), list[int](), list[str]()
    for place, path in enumerate(text):
        if domains.count(path.stem) > 1:
            raise FitError(f"two of the texts are called {path.stem!r}, which names a domain: rename one")
        lines = list(dict.fromkeys(piece.strip() for _, content in texts_of(path) for piece in pieces(content)))
        lines = [lines[number] for number in rng.permutation(len(lines)) if lines[number]]
        share = count // len(text) + (place < count % len(text))
        encoded = tokenizer(lines[:share], truncation=False, verbose=False)["input_ids"] if lines[:share] else []
        kept = [list(row) for row in encoded if len(row) <= longest]
        if len(kept) < 4:
            raise FitError(
                f"the text {path.stem!r} has {len(kept)} sources of at most {longest:,} tokens (a line each, or a "
                f"paragraph where blank lines separate them), and 4 are needed of each text: give more"
                + (f", or more than {count} --texts" if share < 4 else "")
            )
        held = max(2, round(_HELD_OUT * len(kept)))
        sides += [JUDGING] * (held - held // 2) + [SPEED] * (held // 2) + [TRAINING] * (len(kept) - held)
        rows += kept
        places += [place] * len(kept)
        dropped = f", {len(encoded) - len(kept):,} longer ones left out" if len(kept) < len(encoded) else ""
        sources.append(f"{path.name}: {len(kept):,} sources of at most {longest:,} tokens{dropped}; licence not stated")
    domain_of, side_of = (np.array(values, dtype=np.int64) for values in (places, sides))
    return Prompts(rows, domain_of, side_of, domains, sources, {}, {})


def set_prompts(
    names: Sequence[str],
    continuations: int,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    seed: int,
    behind: str = "--new-tokens",
) -> Prompts:
    """The training prompts of prompt sets, each repeated once for every continuation.

    A tenth of the prompts of each set, at least one, is held out: all of their continuations are for `JUDGING`.

    Args:
        names: the sets.
        continuations: how often each prompt is to be continued.
        tokenizer: tokeniser of the target.
        room: most tokens of a prompt.
        seed: seed of the order and of the held-out prompts.
        behind: option of what must fit behind a prompt; empty for sources.

    Raises:
        PromptFileError: there is no such set, or it cannot be read.
        FitError: a set has fewer than two prompts, a prompt is too long, or two sets have the same name.
    """
    rng = np.random.default_rng(seed)
    rows, places, sides, domains, sources = list[list[int]](), list[int](), list[int](), list[str](), list[str]()
    for place, name in enumerate(names):
        prompt_set = load_prompts(name)
        domain = f"{Path(name).stem} prompts"
        if domain in domains:
            raise FitError(f"two of the prompt sets are called {Path(name).stem!r}: rename one, or give it once")
        encoded = _encoded(prompt_set, tokenizer, room, behind)
        held = set(rng.permutation(len(encoded))[: max(1, round(_HELD_OUT * len(encoded)))].tolist())
        for number, prompt in enumerate(encoded):
            rows += [prompt] * continuations
            sides += [JUDGING if number in held else TRAINING] * continuations
        places += [place] * (continuations * len(encoded))
        domains.append(domain)
        # The path of a file says nothing on another machine.
        source = Path(prompt_set.source).name if Path(prompt_set.source).is_absolute() else prompt_set.source
        sources.append(f"{domain}: {len(encoded)} for training, {source}; licence {prompt_set.licence}")
    order = rng.permutation(len(rows))
    domain_of, side_of = (np.array(values, dtype=np.int64)[order] for values in (places, sides))
    return Prompts([rows[n] for n in order], domain_of, side_of, tuple(domains), sources, {}, {})


def _encoded(prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase, room: int, behind: str) -> list[list[int]]:
    if len(prompt_set.train) < 2:
        raise FitError(f"the prompt set {prompt_set.name} has 1 prompt for training, and one is held out: give more")
    # A prompt that lost its beginning would be another prompt, so none is cut here.
    encoded = encode(prompt_set, "train", tokenizer)
    longest = max(range(len(encoded)), key=lambda number: len(encoded[number]))
    if len(encoded[longest]) > room:
        raise FitError(
            f"the prompt set {prompt_set.name}: train[{longest}] has {len(encoded[longest]):,} tokens, and the target "
            f"has room for {room:,}{behind and ' before '}{behind}: shorten or remove it"
            f"{behind and ', or give fewer '}{behind}"
        )
    return encoded
