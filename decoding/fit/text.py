"""From documents to batches of tokens: reading a corpus or plain files, packing, and a resumable order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .errors import FitError

_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex"}


def read_documents(corpus: Path, side: str) -> list[tuple[str, str, str]]:
    """(domain, name, text) of every document on one side of a corpus.

    Args:
        corpus: folder written by the corpus command.
        side: ``train`` or ``held-out``.

    Raises:
        FileNotFoundError: if the folder holds no corpus.
    """
    files = sorted(corpus.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no corpus in {corpus}: make one with 'python -m specgym.decoding.fit corpus'")
    found = []
    for path in files:
        with path.open(encoding="utf-8") as file:
            rows = (json.loads(line) for line in file)
            found += [(path.stem, row["name"], row["text"]) for row in rows if row["split"] == side]
    return found


def read_plain(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    """(domain, name, text) of text files and folders of them; each given path is one domain.

    Raises:
        FileNotFoundError: if a path does not exist or a folder holds no text file.
    """
    found = []
    for path in paths:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"no text in {path}: give a file, or a folder with {', '.join(sorted(_SUFFIXES))}")
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            # A large file is cut at blank lines, so that a part of it can be held out.
            for index, part in enumerate(_parts(text, 8000)):
                found.append((path.stem, f"{file.name}#{index}", part))
    return found


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
    """The token ids of each text, followed by the separator (eos), int32.

    Args:
        tokenizer: must have an eos token.
        texts: the documents.

    Raises:
        FitError: if the tokeniser has no eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise FitError(f"the tokeniser {tokenizer.name_or_path!r} has no eos token to put between documents")
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray([*row, eos], dtype=np.int32) for row in rows]


def pack(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> np.ndarray:
    """`tokenise`, and all texts as one row; shape (n,), int32."""
    return np.concatenate(tokenise(tokenizer, texts))


def shuffled(rows: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Tokenised documents as one row, in a random order; shape (n,), int32."""
    return np.concatenate([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])


def token_digest(tokens: np.ndarray) -> str:
    """SHA-256 of a row of tokens, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()


class Windows:
    """Batches of windows cut from a row of tokens, in an order that depends on the seed and the step alone.

    Every epoch cuts the row at another offset and visits its windows in another order. Asking for a step needs no
    history, which is what makes a resumed run equal to one that was never stopped.

    Args:
        tokens: shape (n,), integer.
        batch: windows in a batch.
        length: tokens a window sees; it also gives the token that follows, for the last prediction.
        seed: of the order.
        key: of everything else that the result of training depends on.

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
