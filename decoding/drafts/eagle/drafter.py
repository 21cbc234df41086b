"""A draft that is an EAGLE head, at work beside its target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...models.kv_cache import PreallocatedLayer
from ...models.language_model import LanguageModel
from ...models.output_layer import bytes_of_pass
from ...sampling import Sampling, draw
from ..drafter import DraftSession, DraftStep, ModelStep
from .head import EagleHead
from .passes import HeadPasses
from .target import StatesTarget

PART = 256
"""Positions that are read at a time, so that no mask is as long as it is wide."""


class EagleDrafter:
    """An EAGLE head that drafts for its target, whose hidden states it reads as they are verified.

    It drafts in the text that the target of its own pair reads (`beside`), and in no other.

    Args:
        head: attached to the target.
        target: of the pair.
        prepack: keep matrices in float16 on a CPU, where they are such numbers.

    Attributes:
        head: as given.
        name: of the head.
        vocabulary_size: that of the target.
        context_limit: tokens of the longest text.
        passes: of the head, shared by all texts.
        target: of the text at hand; None where there is none.
    """

    def __init__(self, head: EagleHead, target: LanguageModel, *, prepack: bool = True) -> None:
        self.head = head.serving(target.model).eval()
        if prepack:
            self.head.pack()
        self.name, self.vocabulary_size = head.name, target.vocabulary_size
        self.passes = HeadPasses(self.head)
        self.context_limit = min(self.head.shape.context, target.context_limit)
        self.target: StatesTarget | None = None

    def digest(self) -> str:
        """Return a SHA-256 over the head, 64 hex digits."""
        return self.head.digest()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that the head has beside its target's."""
        rows = [self.head.output] if self.head.shape.vocabulary and self.head.lm_head is None else []
        return sum(map(bytes_of_pass, [self.head, *rows]))

    def beside(self, target: LanguageModel) -> EagleDrafter:
        """Return the draft for a text that a target has begun to read.

        Raises:
            UnsupportedModelError: the target does not keep the states that the head reads.
        """
        states = getattr(target, "states", None)
        if states is None or getattr(target, "layers", None) != self.head.shape.layers:
            raise UnsupportedModelError(
                f"the EAGLE head {self.name} reads hidden states that {target.name} does not keep here; it drafts for "
                "the target of its own pair alone: Pair(target, head), and a decoder of that pair"
            )
        near = copy.copy(self)
        near.target = target  # type: ignore[assignment]  # or what processes its scores
        return near

    @torch.inference_mode()
    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Read the prompt, of which the target has read all but the last token.

        Raises:
            UnsupportedModelError: the draft is not `beside` a target.
        """
        if self.target is None:
            raise UnsupportedModelError(
                f"the EAGLE head {self.name} drafts in a text that its target reads, and was asked to alone; take "
                "another draft here"
            )
        self.passes.renew()
        return EagleSession(self, self.target, prompt, sampling, generator)


class EagleSession:
    """A head at work on one text.

    Args:
        drafter: the head.
        target: that reads the text.
        prompt: token ids.
        sampling: how tokens are chosen.
        generator: of the random numbers, on the target's device.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        target: StatesTarget,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        self._head, self._passes, self._target = drafter.head, drafter.passes, target
        self._sampling, self._generator = sampling, generator
        self._context_limit = drafter.context_limit
        self._cache = PreallocatedLayer()
        self._sure = 0
        """Positions that were read with the target's states; those behind them were read with the head's own."""
        self._ends: list[tuple[Tensor, Tensor]] = []
        """The head's states and scores, at the last of the sure positions and at all behind them."""
        self._tokens: list[Tensor] = []
        """Tokens that were read at the positions behind the sure ones, each of shape (1,)."""
        if len(prompt) > 1 and self.room(prompt) > 0:
            self._catch_up(prompt)

    @torch.inference_mode()
    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Draft up to `count` tokens, as far as the context has room; none before the target has read a token."""
        count = min(count, self.room(context))
        if count <= 0 or len(context) < 2 or not self._target.states.length:
            return
        scores = self._catch_up(context)
        for number in range(count):
            if self._sampling.greedy:
                probabilities = None
                token = scores.argmax(-1)
            else:
                probabilities = self._sampling.probabilities(scores)
                token = draw(probabilities, self._generator)
            yield ModelStep(token, scores, probabilities)
            if number + 1 < count:
                scores = self._go_on(token)

    def room(self, context: Sequence[int]) -> int:
        """Return how many tokens can be drafted after a context; 0 or less for none."""
        return self._context_limit - len(context) + 1

    def truncate(self, length: int) -> None:
        """Forget what was read from position `length` of the text on."""
        self._cut(max(0, length - 1))

    def _cut(self, positions: int) -> None:
        """Keep so many positions of the head."""
        if positions < self._sure:
            self._sure, self._ends, self._tokens = positions, [], []
        else:
            drafted = positions - self._sure
            del self._tokens[drafted:], self._ends[drafted + 1 :]
        self._cache.cut(positions)

    def _catch_up(self, context: Sequence[int]) -> Tensor:
        """Read what is new of a text; returns scores of the token after it, shape (1, vocabulary)."""
        known = min(self._target.states.length, len(context) - 1)
        drafted = context[known + 1 :]
        if self._sure > known or not self._ends:
            self._cut(min(self._sure, known - 1))  # the last position is read once more, for its state
        elif self._sure < known:
            self._cut(self._sure)
        else:
            self._cut(known + self._agreeing(drafted))
        while self._sure < known:
            end = min(known, self._sure + PART)
            states = self._target.states.between(self._sure, end)
            tokens = torch.tensor(context[self._sure + 1 : end + 1], device=states.device)
            self._ends = [self._passes.read(tokens, states, self._sure, self._cache)]
            self._sure = end
        for token in drafted[len(self._tokens) :]:
            self._go_on(torch.tensor([token], device=self._target.device))
        return self._ends[-1][1]

    def _agreeing(self, drafted: Sequence[int]) -> int:
        """Count the first of some tokens that were read behind the sure positions."""
        read = torch.cat(self._tokens).tolist() if self._tokens and drafted else []
        count = 0
        for token, read_token in zip(drafted, read, strict=False):
            if token != read_token:
                break
            count += 1
        return count

    def _go_on(self, token: Tensor) -> Tensor:
        """Read a drafted token; returns scores of the one after it."""
        place = self._sure + len(self._tokens)
        self._ends.append(self._passes.go_on(token, self._ends[-1][0], place, self._cache))
        self._tokens.append(token)
        return self._ends[-1][1]
