"""Documents of a corpus or of plain files, as tokens to train on and tokens held out.

Batches that depend on the seed and the step alone: windows of a text, positions, whole texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...errors import FitError

_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex"}
_HELD_OUT_SHARE = 0.08


class Passage(NamedTuple):
    """A document, or a part of a file.

    Attributes:
        domain: kind of text, or file that it comes from.
        name: name within the domain.
        text: the text.
    """

    domain: str
    name: str
    text: str


@dataclass(frozen=True)
class CorpusTokens:
    """Tokens of one fit.

    Attributes:
        train: all domains mixed, shape (n,), int32.
        domains: the same by domain, in the order of the documents, shape (m,), int32.
        held_out: held-out tokens of each domain, shape (m,), int32.
        sources: lines on the origin of the text, its licence and its digest.
    """

    train: np.ndarray
    domains: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    sources: list[str]


def unit_hash(key: str, salt: str = "split") -> float:
    """A number in [0, 1) that depends on nothing but ``key`` and ``salt``."""
    data = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return int.from_bytes(data[:6], "big") / 2**48


def held_out(key: str) -> bool:
    """Decide by a hash whether to hold out the document with this key."""
    return unit_hash(key) < _HELD_OUT_SHARE


def read_documents(corpus: Path, side: str) -> list[Passage]:
    """Read the documents on one side, ``train`` or ``held-out``, of a corpus made by ``python -m recipes.corpus``.

    Raises:
        FileNotFoundError: the folder holds no corpus.
    """
    files = sorted(corpus.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"no corpus in {corpus}: give text with --text, or make the corpus in a checkout with "
            "'python -m recipes.corpus'"
        )
    passages = []
    for path in files:
        with path.open(encoding="utf-8") as file:
            rows = (json.loads(line) for line in file)
            passages += [Passage(path.stem, row["name"], row["text"]) for row in rows if row["split"] == side]
    return passages


def read_plain(paths: Sequence[Path]) -> list[Passage]:
    """Read text files and folders of them, each path as one domain.

    Raises:
        FileNotFoundError: a path does not exist or a folder holds no text file.
    """
    passages = []
    for path in paths:
        for name, text in texts_of(path):
            # A large file is cut at blank lines, so that a part of it can be held out.
            passages += [Passage(path.stem, f"{name}#{n}", part) for n, part in enumerate(_parts(text, 8000))]
    return passages


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of a text file, or of all in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no text in {path}: give a file, or a folder with {', '.join(sorted(_SUFFIXES))}")
    for file in files:
        yield file.name, file.read_text(encoding="utf-8-sig", errors="replace")  # without a byte order mark


def _parts(text: str, size: int) -> Iterator[str]:
    part = ""
    for paragraph in text.split("\n\n"):
        part += paragraph + "\n\n"
        if len(part) >= size:
            yield part
            part = ""
    if part.strip():
        yield part


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[np.ndarray]:
    """Token ids of each text, followed by the separator (eos), int32.

    Raises:
        FitError: the tokeniser has no eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise FitError(f"the tokeniser {tokenizer.name_or_path!r} has no eos token to put between documents")
    documents = list(texts)
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    return [np.asarray([*row, eos], dtype=np.int32) for row in rows]


def shuffled(rows: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Tokenised documents in one row, in a random order; shape (n,), int32."""
    return np.concatenate([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])


def token_digest(tokens: np.ndarray) -> str:
    """SHA-256 of a row of tokens, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()


def load_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Path, text: Sequence[Path], seed: int) -> CorpusTokens:
    """Tokens of a corpus folder, or of files and folders of text if any are given, each of which is a domain.

    Raises:
        FileNotFoundError: there is no text.
        FitError: there is too little to hold some out.
    """
    if text:
        passages = read_plain(text)
        names = _hold_out(passages)
        train = [passage for passage in passages if passage.name not in names]
        held = [passage for passage in passages if passage.name in names]
        sources = [f"{path.name}; licence not stated" for path in text]
    else:
        train, held = read_documents(corpus, "train"), read_documents(corpus, "held-out")
        sources = _corpus_sources(corpus)
    rows = tokenise(tokenizer, [passage.text for passage in train])
    tokens = shuffled(rows, seed)
    return CorpusTokens(
        train=tokens,
        domains=_by_domain(train, rows),
        held_out=_by_domain(held, tokenise(tokenizer, [passage.text for passage in held])),
        sources=[*sources, f"training tokens: {len(tokens):,}, SHA-256 `{token_digest(tokens)}`"],
    )


def _by_domain(passages: Sequence[Passage], rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for passage, row in zip(passages, rows, strict=True):
        parts.setdefault(passage.domain, []).append(row)
    return {domain: np.concatenate(members) for domain, members in parts.items()}


def _hold_out(passages: Sequence[Passage]) -> set[str]:
    """Names to hold out: those that the hash chooses, and at least one of every domain."""
    held = set[str]()
    for domain in {passage.domain for passage in passages}:
        names = [passage.name for passage in passages if passage.domain == domain]
        if len(names) < 2:
            raise FitError(f"the text {domain!r} is too short to hold some of it out: give more than 8000 characters")
        chosen = [name for name in names if held_out(name)]
        held.update(chosen[: len(names) - 1] or names[-1:])
    return held


def _corpus_sources(corpus: Path) -> list[str]:
    manifest = corpus / "corpus.json"
    if not manifest.is_file():
        return [f"{corpus.name}; licence not stated"]
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    return [f"{domain}: {entry['source']}; SHA-256 `{entry['digest']}`" for domain, entry in entries.items()]


class Batches(Protocol):
    """Training data by step; a step needs no history, so that a resumed run equals one that was never stopped."""

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step."""
        ...

    def digest(self) -> str:
        """Hash of everything that the batches depend on besides the settings."""
        ...


class Unit(NamedTuple):
    """Contents of a batch, and the advice where there are too few.

    Attributes:
        name: the things that a batch holds, in the plural.
        way_out: the options that help.
    """

    name: str
    way_out: str


POSITIONS = Unit(
    "tokens of the target's own text", "give more --texts or --new-tokens, or a smaller --batch or --length"
)
TEXTS = Unit("texts to train on", "give more --texts or a smaller --batch")
SOURCES = Unit("sources to train on", "give more --text, --texts or --prompt-sets, or a smaller --batch")


def require_batch(count: int, size: int, unit: Unit) -> None:
    """Refuse fewer items than one batch.

    Raises:
        FitError: ``count`` is less than ``size``.
    """
    if count < size:
        raise FitError(f"{count} {unit.name} are too few for a batch of {size}: {unit.way_out}")


class PositionBatches:
    """Batches of positions, or of texts, by their numbers; every epoch has another order.

    Args:
        positions: numbers to choose from, shape (n,), int64.
        size: positions in a batch.
        seed: seed of the order.
        key: everything else that the result of training depends on.
        unit: the things that are numbered.

    Raises:
        FitError: there are fewer positions than one batch needs.
    """

    def __init__(self, positions: np.ndarray, size: int, seed: int, key: str, unit: Unit = POSITIONS) -> None:
        require_batch(len(positions), size, unit)
        self._positions, self._size, self._seed, self._key = positions, size, seed, key
        self._per_epoch = len(positions) // size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 of the positions and the key, 64 hex digits."""
        numbers = np.ascontiguousarray(self._positions, dtype="<i8").tobytes()
        return hashlib.sha256(self._key.encode() + numbers).hexdigest()

    def __call__(self, step: int) -> torch.Tensor:
        """The positions of one step, shape (size,), int64."""
        epoch, place = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._positions))
            self._epoch = epoch
        chosen = self._order[place * self._size : (place + 1) * self._size]
        return torch.from_numpy(self._positions[chosen])


class Windows:
    """Batches of windows cut from a row of tokens; every epoch has another offset and another order.

    Args:
        tokens: shape (n,), integer.
        batch: windows in a batch.
        length: tokens of a window; one more follows, for the last prediction.
        seed: seed of the order.
        key: everything else that the result of training depends on.

    Raises:
        FitError: if there are not enough tokens for one batch.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int, key: str = "") -> None:
        self.tokens, self.batch, self.length, self.seed, self._key = tokens, batch, length, seed, key
        # One window less than fits leaves room for the offset.
        self.per_epoch = ((len(tokens) - 1) // length - 1) // batch
        if self.per_epoch < 1:
            raise FitError(f"{len(tokens)} tokens of text are too few for a batch of {batch} windows of {length}")
        self._epoch, self._order, self._offset = -1, np.empty(0, dtype=np.int64), 0

    def digest(self) -> str:
        """SHA-256 of the tokens, 64 hex digits, and the key."""
        return token_digest(self.tokens) + self._key

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step: int64, shape (batch, length + 1)."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._offset = int(rng.integers(self.length))
            self._order = rng.permutation(self.per_epoch * self.batch)
            self._epoch = epoch
        chosen = self._order[place * self.batch : (place + 1) * self.batch]
        starts = self._offset + chosen * self.length
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
