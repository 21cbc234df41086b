"""Drafting from a table: the likeliest continuation of the last few tokens in some training text.

The longest context that the table knows decides, shorter ones where it does not (back-off without discounting, as in
Brants et al., "Large Language Models in Machine Translation", 2007, whose scores are not needed for an argmax).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import replacing
from ..sampling import Sampling
from ..sealed_files import CHECKSUM, DamagedFileError, arrays_digest, check_digest
from .drafter import DraftSession, DraftStep, OneHotStep

_FORMAT = "specgym-ngram-2"
_UNSEALED = "specgym-ngram-1"  # has no checksum
_WAY_OUT = "fit the table again with specgym.decoding.fit ngram, or reinstall specgym if the package ships it"


class NGramDrafter:
    """Proposes the token that most often followed the last tokens in the text it was fitted on.

    Args:
        vocabulary_size: of the target.
        contexts: for each context length (1, 2, ...) the known contexts as ascending numbers, each the number whose
            digits in base `vocabulary_size` are the context's tokens; int64.
        tokens: for each context length the likeliest next token of each context; int32, same shapes.
        name: how reports call it.
    """

    free: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary_size: int,
        contexts: Sequence[NDArray[np.int64]],
        tokens: Sequence[NDArray[np.int32]],
        name: str = "ngram",
    ) -> None:
        self.name = name
        self.vocabulary_size = vocabulary_size
        self._contexts = list(contexts)
        self._tokens = list(tokens)
        self._powers = [vocabulary_size**length for length in range(len(self._contexts) + 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return sum(array.nbytes for array in self._contexts) + sum(array.nbytes for array in self._tokens)

    @classmethod
    def fit(
        cls,
        texts: Iterable[Sequence[int]],
        vocabulary_size: int,
        order: int = 4,
        smallest_count: int = 1,
        name: str = "ngram",
    ) -> NGramDrafter:
        """Count n-grams.

        Args:
            texts: token ids, one sequence a document; no n-gram spans two.
            vocabulary_size: of the target.
            order: tokens in the longest n-gram, at least 2; a context is one shorter.
            smallest_count: forget contexts longer than one token whose best continuation was seen less often.

        Raises:
            ValueError: no text, ids outside the vocabulary, or an order whose contexts do not fit in 64 bits.
        """
        check_order(order, vocabulary_size)
        documents = [np.asarray(text, dtype=np.int64) for text in texts]
        if not any(len(document) > 1 for document in documents):
            raise ValueError("no document has two tokens; give the n-gram table some text to fit")
        for document in documents:
            if len(document) and not 0 <= document.min() <= document.max() < vocabulary_size:
                raise ValueError(f"the text has token ids outside the vocabulary of {vocabulary_size}")
        contexts, tokens = [], []
        for length in range(1, order):
            followed = [_windows(document[:-1], length, vocabulary_size) for document in documents]
            known, places = np.unique(np.concatenate(followed), return_inverse=True)
            # A context's place among those known is a smaller number than the context, so that a token fits behind it.
            numbers = places * vocabulary_size + np.concatenate([document[length:] for document in documents])
            numbers, counts = np.unique(numbers, return_counts=True)
            if length > 1:
                numbers, counts = numbers[counts >= smallest_count], counts[counts >= smallest_count]
            places = numbers // vocabulary_size
            by_context = np.lexsort((-counts, places))  # the commonest continuation of each context comes first
            places, first = np.unique(places[by_context], return_index=True)
            contexts.append(known[places])
            tokens.append((numbers[by_context][first] % vocabulary_size).astype(np.int32))
        return cls(vocabulary_size, contexts, tokens, name)

    @property
    def longest_context(self) -> int:
        """Number of last tokens that the table looks at."""
        return len(self._contexts)

    @property
    def highest_token(self) -> int:
        """Largest number of a token that the table proposes; -1 for an empty table."""
        return max((int(tokens.max(initial=-1)) for tokens in self._tokens), default=-1)

    def __len__(self) -> int:
        """Number of contexts known."""
        return sum(len(known) for known in self._contexts)

    def digest(self) -> str:
        """SHA-256 over the whole table, 64 hex digits."""
        state = hashlib.sha256(str(self.vocabulary_size).encode())
        for known, tokens in zip(self._contexts, self._tokens, strict=True):
            state.update(np.ascontiguousarray(known).tobytes())
            state.update(np.ascontiguousarray(tokens).tobytes())
        return state.hexdigest()

    def next_token(self, context: Sequence[int]) -> int | None:
        """The likeliest token after a context, or None if not even its last token was ever seen."""
        step = next(self.steps(context, 1), None)
        return None if step is None else int(step.token)

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Follow the table for up to `count` tokens, until it knows no continuation."""
        recent = context[-self.longest_context :]
        number = 0
        for token in recent:
            number = number * self.vocabulary_size + token
        length = len(recent)
        for _ in range(count):
            looked_up = self._look_up(number, length)
            if looked_up is None:
                return
            token, matched = looked_up
            yield OneHotStep(token, matched / self.longest_context, matched)
            length = min(length + 1, self.longest_context)
            number = number % self._powers[self.longest_context - 1] * self.vocabulary_size + token

    def _look_up(self, number: int, length: int) -> tuple[int, int] | None:
        """The likeliest token after the context of so many tokens that a number stands for, and how many decided."""
        for matched in range(length, 0, -1):
            known = self._contexts[matched - 1]
            ending = number % self._powers[matched]
            place = int(known.searchsorted(ending))
            if place < len(known) and known.item(place) == ending:
                return self._tokens[matched - 1].item(place), matched
        return None

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text. The table has no memory of one, so nothing is read."""
        return _NGramSession(self)

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors; a reader never sees half of one."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for length, (known, tokens) in enumerate(zip(self._contexts, self._tokens, strict=True), start=1):
            arrays[f"contexts{length}"] = np.ascontiguousarray(known)
            arrays[f"tokens{length}"] = np.ascontiguousarray(tokens)
        metadata = {"format": _FORMAT, "vocabulary_size": str(self.vocabulary_size), "order": str(len(arrays) // 2 + 1)}
        with replacing(Path(path)) as temporary:
            save_file(arrays, str(temporary), {**metadata, CHECKSUM: _digest(arrays, metadata)})

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> NGramDrafter:
        """Read a table.

        Raises:
            DamagedFileError: the file is missing, damaged, changed after it was written, or not an n-gram table of this
                package.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (_FORMAT, _UNSEALED):
                    raise DamagedFileError(f"{path} is not an n-gram table written by NGramDrafter.save")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = metadata.pop(CHECKSUM, None)
            if stored is not None or metadata["format"] == _FORMAT:
                check_digest(stored, _digest(arrays, metadata))
            vocabulary_size, order = int(metadata["vocabulary_size"]), int(metadata["order"])
            if not 2 <= order <= len(arrays) + 1 or vocabulary_size < 1:
                raise ValueError(f"{len(arrays)} arrays make no table of order {order}")
            lengths = range(1, order)
            contexts = [arrays[f"contexts{length}"] for length in lengths]
            tokens = [arrays[f"tokens{length}"] for length in lengths]
            for length, known, following in zip(lengths, contexts, tokens, strict=True):
                _check(known, following, length, vocabulary_size)
        except FileNotFoundError as error:
            raise DamagedFileError(f"there is no n-gram table at {path}; {_WAY_OUT}") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is damaged ({error}); {_WAY_OUT}") from error
        return cls(vocabulary_size, contexts, tokens, name or Path(path).stem)


def _digest(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    return arrays_digest(arrays, json.dumps(metadata, sort_keys=True))


def _check(known: NDArray[Any], following: NDArray[Any], length: int, vocabulary_size: int) -> None:
    """Raise ValueError unless contexts of a length and the tokens after them are those of a table."""
    if known.dtype != np.int64 or following.dtype != np.int32 or not known.shape == following.shape == (known.size,):
        raise ValueError(f"contexts{length} and tokens{length} are no rows of int64 and int32, equally long")
    largest = min(vocabulary_size**length, 2**63) - 1
    if len(known) and (known[0] < 0 or known[-1] > largest or (known[1:] <= known[:-1]).any()):
        raise ValueError(f"contexts{length} is not ascending, or beyond the vocabulary of {vocabulary_size}")
    if following.min(initial=0) < 0 or following.max(initial=0) >= vocabulary_size:
        raise ValueError(f"tokens{length} has ids outside the vocabulary of {vocabulary_size}")


class _NGramSession:
    def __init__(self, table: NGramDrafter) -> None:
        self._table = table

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Follow the table from the last tokens."""
        return self._table.steps(context, count)

    def truncate(self, length: int) -> None:
        """Nothing to forget."""


def check_order(order: int, vocabulary_size: int) -> None:
    """Refuse an order whose contexts, one token shorter than its n-grams, are no 64-bit numbers.

    Every vocabulary below 2,097,152 tokens has tables of order 4.

    Raises:
        ValueError: it is below 2 or too large; the message says what goes.
    """
    if order < 2 or vocabulary_size ** (order - 1) >= 2**63:
        largest = next(tokens for tokens in range(1, 64) if max(vocabulary_size, 2) ** tokens >= 2**63)
        raise ValueError(
            f"order must be 2 to {largest} for a vocabulary of {vocabulary_size} tokens "
            f"({vocabulary_size}^(order - 1) below 2^63), got {order}"
        )


def _windows(document: NDArray[np.int64], length: int, base: int) -> NDArray[np.int64]:
    """Every run of `length` tokens as one number in the given base, shape (tokens - length + 1,)."""
    if len(document) < length:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(document, length)
    return windows @ (base ** np.arange(length - 1, -1, -1, dtype=np.int64))
