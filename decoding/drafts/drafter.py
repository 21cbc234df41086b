"""Drafts that propose a token at a time: the interface, and drafts that are models.

A drafter that proposes one token with certainty (an n-gram table, the prompt itself) returns no probabilities: its
distribution is one-hot, and the acceptance test treats it so. A proposal may mix both, token by token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot as _one_hot

from ..models.early_exit import ExitModel
from ..models.encoder.encoder_decoder import EncoderDecoder
from ..models.identity import weights_digest
from ..models.language_model import LanguageModel
from ..sampling import Sampling, draw
from .translated import TranslatedModel

_SMALLEST_LOG = (
    -200.0
)  # of a probability; e^-200 is 0 in float32, and 0 times this is 0 where it were NaN with infinity


class DraftStep(Protocol):
    """One drafted token."""

    @property
    def token(self) -> Tensor | int:
        """A tensor of shape (1,), int64, on the target's device, for a model; a number for a one-hot draft."""
        ...

    @property
    def logits(self) -> Tensor | None:
        """Scores that the token was chosen from, shape (1, vocabulary), float32; None for a one-hot draft."""
        ...

    @property
    def probabilities(self) -> Tensor | None:
        """Probabilities after warping, shape (1, vocabulary); None for a one-hot draft and when greedy."""
        ...

    @property
    def matched(self) -> int:
        """Tokens of context that a look-up matched; 0 for a model."""
        ...

    def confidence(self) -> float:
        """Confidence of the draft in this token, 0 to 1; see the implementations."""
        ...

    def entropy(self) -> float:
        """Entropy in nats of what the token was drawn from, at least 0."""
        ...

    def drawn_probability(self) -> float:
        """Probability with which this very token was drawn, 0 to 1; at temperature 1 when greedy."""
        ...


# Neither kind of step is frozen: that would treble the time of making one, and a table makes 16 in 20 microseconds.
@dataclass(slots=True, eq=False)
class OneHotStep:
    """A token that a draft proposes with certainty.

    Attributes:
        token: its number.
        match: confidence of the draft, in (0, 1]: for an n-gram table and prompt lookup how long a context it matched,
            as a share of the longest it looks for.
        matched: tokens of that context; 0 where it is not known.
    """

    token: int
    match: float = 1.0
    matched: int = 0

    @property
    def logits(self) -> None:
        """None."""

    @property
    def probabilities(self) -> None:
        """None."""

    def confidence(self) -> float:
        """The share `match`, since the draft has no probabilities."""
        return self.match

    def entropy(self) -> float:
        """0."""
        return 0.0

    def drawn_probability(self) -> float:
        """1."""
        return 1.0


@dataclass(slots=True, eq=False)
class ModelStep:
    """A token that a model proposes; the attributes are those of `DraftStep`."""

    token: Tensor
    logits: Tensor
    probabilities: Tensor | None = None
    _confidence: float | None = field(default=None, init=False, repr=False)
    _entropy: float | None = field(default=None, init=False, repr=False)

    @property
    def matched(self) -> int:
        """0."""
        return 0

    def confidence(self) -> float:
        """The largest probability of what the token was drawn from, at temperature 1 when greedy.

        0 where the model's logits are NaN or infinite. Waits for the device, unless `entropy` has done so.
        """
        if self._confidence is None:
            row = self.logits[0].softmax(-1) if self.probabilities is None else self.probabilities[0]
            largest = float(row.amax())
            self._confidence = min(largest, 1.0) if math.isfinite(largest) else 0.0  # a broken draft knows nothing
        return self._confidence

    def entropy(self) -> float:
        """Entropy of that distribution in nats; the logarithm of the vocabulary where logits are not finite.

        Waits for the device once, for this and the confidence together.
        """
        if self._entropy is None:
            self._confidence, self._entropy = _certainty(self.logits, self.probabilities)
        return self._entropy

    def drawn_probability(self) -> float:
        """Return that of the drawn token; when greedy that is the likeliest. Waits for the device."""
        if self.probabilities is None:
            return self.confidence()
        drawn = float(self.probabilities[0, self.token])
        return min(drawn, 1.0) if math.isfinite(drawn) else 0.0


def _certainty(logits: Tensor, probabilities: Tensor | None) -> tuple[float, float]:
    """The largest probability, and the entropy in nats."""
    if probabilities is None:
        logs = logits[0].log_softmax(-1)
        row = logs.exp()
    else:
        row = probabilities[0]
        logs = row.log()
    largest, negative_entropy = torch.stack([row.amax(), row @ logs.clamp(min=_SMALLEST_LOG)]).tolist()
    if not math.isfinite(largest + negative_entropy):
        return 0.0, math.log(row.shape[0])  # a broken draft knows nothing
    return min(largest, 1.0), max(-negative_entropy, 0.0)


@dataclass(frozen=True)
class Proposal:
    """A chain of drafted tokens.

    Attributes:
        tokens: shape (drafted,), int64, on the target's device.
        logits: shape (drafted, vocabulary), float32, what each token was chosen from; None if all tokens are one-hot.
        probabilities: the same after warping, shape (drafted, vocabulary); None if all are one-hot, and when greedy.

    Where one-hot tokens stand beside those of a model, theirs are the rows of one-hot distributions.
    """

    tokens: Tensor
    logits: Tensor | None = None
    probabilities: Tensor | None = None

    @classmethod
    def of(cls, steps: Sequence[DraftStep], device: torch.device) -> Proposal:
        """Put the steps of a draft, in order, into one tensor a field, on the target's device.

        Steps of several drafts may follow one another; those of models all have probabilities, or none has.
        """
        model = next((step for step in steps if step.logits is not None), None)
        if model is None:
            numbers = np.array([step.token for step in steps], dtype=np.int64)
            return cls(torch.from_numpy(numbers).to(device))
        tokens = [torch.as_tensor(step.token, device=device).reshape(1) for step in steps]
        logits = cast("list[Tensor | None]", [step.logits for step in steps])
        probabilities = [step.probabilities for step in steps]
        warped = model.probabilities is not None
        if any(rows is None for rows in logits):
            vocabulary = cast(Tensor, model.logits).shape[-1]
            certain = [
                one_hot(token, vocabulary) if rows is None else None for token, rows in zip(tokens, logits, strict=True)
            ]
            logits = [rows if row is None else row.log() for rows, row in zip(logits, certain, strict=True)]
            probabilities = [rows if row is None else row for rows, row in zip(probabilities, certain, strict=True)]
        return cls(
            torch.cat(tokens),
            torch.cat(cast("list[Tensor]", logits)),
            torch.cat(cast("list[Tensor]", probabilities)) if warped else None,
        )


def one_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the distribution of a certain token, float32; shape (n,) to (n, vocabulary)."""
    return _one_hot(tokens, vocabulary).float()


class DraftSession(Protocol):
    """A draft at work on one text."""

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Begin a new draft of what may follow `context` (prompt and all emitted tokens), one token at a time.

        The iterator gives up to `count` tokens, fewer where the draft knows none or its own context is full. A token
        costs nothing until it is asked for, and whoever asks may stop at any one.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget what was read or drafted from position `length` of the context on."""
        ...


def propose(session: DraftSession, context: Sequence[int], count: int, device: torch.device | None = None) -> Proposal:
    """Draft a whole chain: up to `count` tokens that may follow `context`.

    Args:
        session: the draft at work on this text.
        context: token ids of the prompt and all emitted tokens.
        count: tokens to draft at most.
        device: the target's, by default the CPU.
    """
    return Proposal.of(list(session.steps(context, count)), device or torch.device("cpu"))


class Drafter(Protocol):
    """Anything that can propose tokens for a target. May be `free`, see `is_free`."""

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
        model: the draft model, which must have the target's vocabulary, or be translated into it (`Pair` does that).
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.name = model.name
        self.vocabulary_size = model.vocabulary_size

    def digest(self) -> str:
        """Return a SHA-256 over the model's weights, and how it is translated if it is, 64 hex digits."""
        digest = weights_digest(self.model.model)
        if isinstance(self.model, TranslatedModel):
            digest = hashlib.sha256(f"{digest} {self.model.translation.digest()}".encode()).hexdigest()
        return digest

    def beside(self, target: LanguageModel) -> Drafter:
        """Return the draft for a text that a target reads.

        An early exit of that target reads it in its cache, and a draft with an encoder reads its source.
        """
        if not isinstance(self.model, ExitModel | EncoderDecoder):
            return self
        near = copy(self)
        near.model = self.model.within(target) if isinstance(self.model, ExitModel) else self.model.beside(target)
        return near

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Read the prompt, all but its last token. A prompt longer than the draft's context yields no drafts."""
        return _ModelDraftSession(self.model.fresh(), prompt, sampling, generator, device)


def draft_digest(draft: Drafter) -> str:
    """Return a SHA-256 over what a draft's proposals depend on, 64 hex digits.

    A drafter from elsewhere may have a method `digest` of its own; of others only the name is known.
    """
    digest = getattr(draft, "digest", None)
    return str(digest()) if digest is not None else hashlib.sha256(draft.name.encode()).hexdigest()


def beside(draft: Drafter, target: LanguageModel) -> Drafter:
    """Return a draft as it works in a text that a target has begun to read; most work alike in all.

    A drafter says so by a method `beside` of its own.
    """
    method = getattr(draft, "beside", None)
    return draft if method is None else cast("Drafter", method(target))


def is_free(draft: Drafter) -> bool:
    """Return whether a draft's proposals cost microseconds, so that they may be looked at without being asked for.

    A drafter says so by an attribute `free`; without one it is not.
    """
    return bool(getattr(draft, "free", False))


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
        if len(prompt) > 1 and model.room(prompt) >= 0:
            model.read(prompt[:-1])

    @torch.inference_mode()
    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Draft up to `count` tokens, as far as the draft model's context has room."""
        if self._model.length >= len(context):  # an earlier draft was left as it was
            self._model.truncate(len(context) - 1)
        count = min(count, self.room(context))
        if count <= 0:
            return
        # After a full acceptance two tokens are unread (the last draft and the bonus), otherwise one.
        unread = torch.tensor(context[self._model.length :])
        for _ in range(count):
            # Drawn on the target's device, where the generator is; the draft may sit on another.
            scores = self._model.forward(unread.to(self._model.device), last=1).scores.to(self._device)
            if self._sampling.greedy:
                probabilities = None
                unread = scores.argmax(-1)
            else:
                probabilities = self._sampling.probabilities(scores)
                unread = draw(probabilities, self._generator)
            yield ModelStep(unread, scores, probabilities)

    def room(self, context: Sequence[int]) -> int:
        """Return how many tokens can be drafted after a context; 0 or less for none."""
        return self._model.room(context) + 1

    def truncate(self, length: int) -> None:
        """Cut the draft's cache back."""
        self._model.truncate(length)
