"""Cascades: a table or a look-up drafts for a small model, which drafts for the target.

The small model reads what the inner draft guesses in a single pass, and proposes token by token what it would have
proposed alone: it draws from its own distribution at every place, and goes on through the pass for as long as the guess
is what it drew. A guess is thereby kept with the model's probability of it, and a token in its place has the residual
distribution, as in speculative sampling with a draft that is certain (Leviathan et al., arXiv 2211.17192). Drafts that
draft for drafts are those of Chen et al., "Cascade Speculative Drafting" (arXiv 2312.11462), and of Spector and Re,
"Staged Speculative Decoding" (arXiv 2308.04623).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from ..errors import ArgumentError, VocabularyMismatchError, whole_number
from ..models.language_model import LanguageModel
from ..sampling import Sampling, draw
from .drafter import Drafter, DraftSession, DraftStep, ModelDrafter, ModelStep, beside, draft_digest, is_free


class CascadeDrafter(ModelDrafter):
    """A model that drafts for a target, and for which a table or a look-up drafts.

    Its tokens, their distributions and, for a seed, its draws are those of the model alone; only their cost differs,
    and that depends on the text: a latency profile, timed on a text that repeats itself, has it at its lowest.
    Whatever drafts by the model itself (trees, recordings) leaves the inner draft aside.

    Args:
        drafter: the model, or a `ModelDrafter` of it; its vocabulary must be the target's, or be translated into it.
        inner: a table or a look-up that speaks of the same tokens.
        length: most guesses that the model reads at a time.

    Raises:
        ArgumentError: `inner` is no table or look-up, `drafter` no model or a cascade itself, or `length` not positive.
        VocabularyMismatchError: the two do not speak of the same tokens.
    """

    def __init__(self, drafter: ModelDrafter | LanguageModel, inner: Drafter, length: int = 8) -> None:
        model = drafter.model if isinstance(drafter, ModelDrafter) else drafter
        if isinstance(drafter, CascadeDrafter) or not isinstance(model, LanguageModel):
            raise ArgumentError(f"the drafter of a cascade must be a model that drafts alone, got {drafter!r}")
        if not is_free(inner):
            raise ArgumentError(
                f"{inner.name} cannot draft for {model.name}: the inner draft of a cascade is a table or a look-up "
                "(NGramDrafter, PromptLookupDrafter, SuffixDrafter), whose guesses cost nothing"
            )
        if inner.vocabulary_size != model.vocabulary_size:
            raise VocabularyMismatchError(
                f"draft {model.name} has a vocabulary of {model.vocabulary_size} tokens and {inner.name}, which is to "
                f"draft for it, one of {inner.vocabulary_size}; make one of the same tokens"
            )
        super().__init__(model)
        self.inner = inner
        self.length = whole_number("length", length)
        self.name = f"{model.name}:drafted-by-{inner.name}"

    @property
    def nbytes(self) -> int:
        """Bytes of the inner draft's table, if it is one."""
        return int(getattr(self.inner, "nbytes", 0))

    def digest(self) -> str:
        """Return a SHA-256 over the model, the inner draft and the length, 64 hex digits."""
        parts = f"cascade {super().digest()} {draft_digest(self.inner)} {self.length}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def beside(self, target: LanguageModel) -> Drafter:
        """Return the draft for a text that a target reads, as both parts work in it."""
        near = cast("CascadeDrafter", copy(super().beside(target)))
        near.inner = beside(self.inner, target)
        return near

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text with both. A prompt longer than the model's context yields no drafts."""
        return _CascadeSession(self, prompt, sampling, generator, device)


class _CascadeSession:
    def __init__(
        self,
        drafter: CascadeDrafter,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._model = model = drafter.model.fresh()
        self._length = drafter.length
        self._sampling = sampling
        self._generator = generator
        self._device = device
        if len(prompt) > 1 and model.room(prompt) >= 0:
            model.read(prompt[:-1])
        self._sure = model.length  # tokens in the cache that are the text's; those after them are guesses
        self._inner = drafter.inner.start(prompt, sampling, generator, device)

    @torch.inference_mode()
    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Draft up to `count` tokens, as far as the model's context has room."""
        text = list(context)
        self._cut(len(text) - 1)
        count = min(count, self._model.room(text) + 1)
        while count > 0:
            guesses = self._guesses(text, count - 1)
            for place, step in enumerate(self._read(text, guesses)):
                token = int(step.token)
                right = place < len(guesses) and token == guesses[place]
                text.append(token)
                count -= 1
                # Whoever asked may leave here, and go on with other tokens than the guesses that were read.
                self._sure += right
                yield step
                if not right:
                    break
            self._cut(self._sure)

    def truncate(self, length: int) -> None:
        """Cut the cache of the model back, and the index of the inner draft."""
        self._cut(length)
        self._inner.truncate(length)

    def _cut(self, length: int) -> None:
        self._sure = min(self._sure, length)
        if self._model.length > self._sure:
            self._model.truncate(self._sure)

    def _guesses(self, text: Sequence[int], count: int) -> list[int]:
        """Up to so many tokens that may follow, as many as the model can read."""
        guesses = [int(step.token) for step in islice(self._inner.steps(text, count), min(count, self._length))]
        while guesses and not self._fits([*text, *guesses]):
            guesses.pop()
        return guesses

    def _fits(self, text: Sequence[int]) -> bool:
        return self._model.room(text) >= 0 and len(text) <= self._model.pass_limit(self._model.length)

    def _read(self, text: Sequence[int], guesses: Sequence[int]) -> Iterator[ModelStep]:
        """Read what is new of the text, and guesses; the model's tokens after the text and after each of the guesses,
        drawn only when they are asked for."""
        unread = torch.tensor([*text[self._model.length :], *guesses], device=self._model.device)
        scores = self._model.forward(unread, last=len(guesses) + 1).scores.to(self._device)
        self._sure = len(text)
        greedy = self._sampling.greedy
        probabilities: Tensor | None = None if greedy else self._sampling.probabilities(scores)
        for place in range(len(guesses) + 1):
            row = scores[place : place + 1]
            if probabilities is None:
                yield ModelStep(row.argmax(-1), row)
            else:
                drawn_from = probabilities[place : place + 1]
                yield ModelStep(draw(drawn_from, self._generator), row, drawn_from)
