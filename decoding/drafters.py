"""What proposes tokens: the interface of a draft, and a draft that is a model.

A drafter that proposes one token with certainty (an n-gram table, the prompt itself) returns no probabilities: its
distribution is one-hot, and the acceptance test treats it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .models import LanguageModel
from .sampling import Sampling, draw


@dataclass(frozen=True)
class Proposal:
    """A chain of drafted tokens.

    Attributes:
        tokens: shape (drafted,), int64, on the target's device.
        logits: shape (drafted, vocabulary), float32, what each token was chosen from; None for a one-hot draft.
        probabilities: the same after warping, shape (drafted, vocabulary); None for a one-hot draft and when greedy.
    """

    tokens: Tensor
    logits: Tensor | None = None
    probabilities: Tensor | None = None


class DraftSession(Protocol):
    """A draft at work on one text."""

    def propose(self, context: Sequence[int], count: int, stop_below: float = 0.0) -> Proposal:
        """Up to `count` tokens that may follow `context` (prompt and all emitted tokens); fewer where it knows none.

        A draft with probabilities ends after a token whose probability is less than `stop_below`.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget what was read or drafted from position `length` of the context on."""
        ...


class Drafter(Protocol):
    """Anything that can propose tokens for a target."""

    name: str
    vocabulary_size: int

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text. The generator drives any sampling, so that a seed fixes the whole decoding."""
        ...


class ModelDrafter:
    """A small causal LM that drafts by sampling (or greedily), one forward pass a token.

    Args:
        model: the draft model, which must share the target's vocabulary.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.name = model.name
        self.vocabulary_size = model.vocabulary_size

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Read the prompt, all but its last token. A prompt longer than the draft's context yields no drafts."""
        return _ModelDraftSession(self.model.fresh(), prompt, sampling, generator, device)


class _ModelDraftSession:
    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._generator = generator
        self._device = device
        if 1 < len(prompt) <= model.context_limit:
            model.read(prompt[:-1])

    @torch.inference_mode()
    def propose(self, context: Sequence[int], count: int, stop_below: float = 0.0) -> Proposal:
        """Draft `count` tokens, or as many as the draft model's context has room for, or up to one it doubts."""
        count = min(count, self._model.context_limit - len(context) + 1)
        if count <= 0:
            return Proposal(torch.empty(0, dtype=torch.int64, device=self._device))
        # After a full acceptance two tokens are unread (the last draft and the bonus), otherwise one.
        unread = torch.tensor(context[self._model.length :])
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        probabilities: list[Tensor] = []
        for _ in range(count):
            # Drawn on the target's device, where the generator is; the draft may sit on another.
            scores = self._model.forward(unread.to(self._model.device), last=1).scores.to(self._device)
            if self._sampling.greedy:
                unread = scores.argmax(-1)
            else:
                probabilities.append(self._sampling.probabilities(scores))
                unread = draw(probabilities[-1], self._generator)
            tokens.append(unread)
            logits.append(scores)
            # The doubtful token itself is still verified, so that where a draft ends does not bias the text.
            if stop_below > 0 and _probability(unread, scores, probabilities) < stop_below:
                break
        return Proposal(
            torch.cat(tokens),
            torch.cat(logits),
            torch.cat(probabilities) if probabilities else None,
        )

    def truncate(self, length: int) -> None:
        """Cut the draft's cache back."""
        self._model.truncate(length)


def _probability(token: Tensor, scores: Tensor, probabilities: list[Tensor]) -> float:
    """Of the last drafted token, under what it was drawn from (temperature 1 when greedy). Waits for the device."""
    distribution = probabilities[-1] if probabilities else scores.softmax(-1)
    return float(distribution[0, token])
