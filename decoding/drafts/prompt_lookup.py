"""Drafting by copying: what followed the last few tokens the last time they occurred in this text.

Prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding); it costs next to nothing
and pays where the output repeats its input, as in summaries, edits and code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch

from ..sampling import Sampling
from .drafter import DraftSession, DraftStep, OneHotStep


class PromptLookupDrafter:
    """Proposes the continuation of the most recent earlier occurrence of the text's last tokens.

    Args:
        vocabulary_size: of the target.
        longest: how many last tokens to look for first; shorter matches are tried when that fails.

    Raises:
        ValueError: `longest` is not positive.
    """

    def __init__(self, vocabulary_size: int, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1 token, got {longest}")
        self.name = "prompt-lookup"
        self.vocabulary_size = vocabulary_size
        self.longest = longest

    def digest(self) -> str:
        """Return a SHA-256 over the settings, 64 hex digits."""
        return hashlib.sha256(f"prompt-lookup {self.longest}".encode()).hexdigest()

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text; its index grows as the text does."""
        return _PromptLookupSession(self.longest)


class _PromptLookupSession:
    def __init__(self, longest: int) -> None:
        # For each length the position after the latest occurrence of every run of that many tokens.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self._indexed = 0

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """The tokens that followed the longest match, none where nothing matches."""
        # The run that ends the text is what we look up: it is indexed only once something follows it.
        for end in range(self._indexed + 1, len(context)):
            for length, after in enumerate(self._after[:end], start=1):
                after[tuple(context[end - length : end])] = end
        self._indexed = max(self._indexed, len(context) - 1)
        for length in range(min(len(self._after), len(context)), 0, -1):
            start = self._after[length - 1].get(tuple(context[-length:]))
            if start is not None:
                return map(OneHotStep, context[start : start + count], repeat(length / len(self._after)))
        return iter(())

    def truncate(self, length: int) -> None:
        """Nothing to forget: only emitted tokens are indexed, and those stay."""
