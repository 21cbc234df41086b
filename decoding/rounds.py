"""Rounds of drafting and verifying, and the finished texts that they make."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from .errors import SpecgymError


@dataclass(frozen=True)
class Round:
    """Result of a round of drafting and verifying."""

    tokens: tuple[int, ...]
    """Emitted, in order; at least one, unless the session had ended."""
    drafted: int
    """Draft tokens that were verified."""
    accepted: int
    """Draft tokens among those emitted; they come first in `tokens`."""
    divergence: float
    """Sum over the emitted tokens of the total variation between what each was drawn from and the target."""
    draft_seconds: float
    verify_seconds: float
    """Everything the round did is in one of the two, or in both."""
    taken_back: tuple[int, ...] = ()
    """Draft tokens that were verified and not kept, in order."""
    draft_steps: int = -1
    """Tokens that the draft made one after another; as many as `drafted` if not given. 0 where drafting needs none."""
    target_tokens: int = -1
    """Tokens that the target's pass read; those drafted and the one before them if not given."""
    awaited_steps: int = 0
    """Those of `draft_steps` that the target waited for, where drafting otherwise goes on while it verifies."""
    overlapped_seconds: float = 0.0
    """Seconds that are in both, where drafting goes on while the target verifies."""

    @property
    def seconds(self) -> float:
        """Seconds of the round, wall-clock."""
        return self.draft_seconds + self.verify_seconds - self.overlapped_seconds

    def __post_init__(self) -> None:
        if self.draft_steps < 0:
            object.__setattr__(self, "draft_steps", self.drafted)
        if self.target_tokens < 0:
            object.__setattr__(self, "target_tokens", self.drafted + 1)


class WholeRounds:
    """Context manager around every round of a text, which refuses a further one after one that was broken off.

    What the models have read and the text itself part where a round ends in an exception, a user's Ctrl-C for instance:
    tokens may be in a cache that are not in the text. A next round would emit tokens that are not the target's.
    """

    def __init__(self) -> None:
        self._ended_by = ""

    def require(self) -> None:
        """Refuse a text whose last round was broken off, or that `end` has ended.

        Raises:
            SpecgymError: so it was; the message says by what.
        """
        if self._ended_by:
            raise SpecgymError(
                f"{self._ended_by}, so that what its models have read is not the text: it cannot go on. Begin it again "
                "with the decoder's `start` or `generate`; the tokens so far are in the session's `tokens`."
            )

    def __enter__(self) -> None:
        """Begin a round. Errors as for `require`."""
        self.require()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End it, with the exception that broke it off, if one did."""
        if kind is not None:
            cause = f"{kind.__name__}: {error}".removesuffix(": ")
            self.end(f"the last round of this text was broken off ({cause})")

    def end(self, why: str) -> None:
        """Have further rounds refused.

        Args:
            why: the beginning of the message, unless the text had ended before.
        """
        self._ended_by = self._ended_by or why


@dataclass(frozen=True)
class Generation:
    """A finished text and how it came about. Seconds are wall-clock seconds."""

    tokens: list[int]
    rounds: list[Round]
    prefill_seconds: float
    """Time to read the prompt, in no round."""
    finish_reason: str
    """`eos`, `stop` (a stop string of the generation config), `length` (max_new_tokens reached) or `context` (the
    model's context is full)."""
    text: str | None = None
    """The tokens as text, where the pair has a tokenizer."""

    @property
    def seconds(self) -> float:
        """Time of all rounds, without reading the prompt."""
        return sum(round_.seconds for round_ in self.rounds)

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per emitted token, without reading the prompt."""
        return 1000 * self.seconds / max(len(self.tokens), 1)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted draft tokens over verified draft tokens; 0 where nothing was drafted."""
        return sum(round_.accepted for round_ in self.rounds) / max(sum(round_.drafted for round_ in self.rounds), 1)

    @property
    def mean_acceptance_length(self) -> float:
        """Emitted tokens per round, the target's own token included."""
        return len(self.tokens) / max(len(self.rounds), 1)

    @property
    def target_tokens_per_token(self) -> float:
        """Tokens that the target read in all rounds, per emitted token: its arithmetic over that of plain decoding."""
        return sum(round_.target_tokens for round_ in self.rounds) / max(len(self.tokens), 1)

    @property
    def divergence(self) -> float:
        """Mean total variation from the target per emitted token; 0 for a lossless decoder."""
        return sum(round_.divergence for round_ in self.rounds) / max(len(self.tokens), 1)
