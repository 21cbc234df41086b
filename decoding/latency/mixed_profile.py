"""Latency profiles of pairs with several drafts: seconds of every draft's next token, and of the target's passes.

A draft that is a model reads what was emitted or drafted by others since it was last asked, in the same pass in which
it proposes its next token; that is what its time depends on. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decoders.expected_gain import KeepChances
from ..errors import check_fields, number, whole_number
from ..sealed_files import write_sealed
from .profile import LatencyProfileError, checked_seconds, interpolated, profile_content

FORMAT = "specgym-mixed-latency-1"
_WAY_OUT = "measure it again: python -m specgym.envs.profiles PAIR/PROMPTS, or specgym.decoding.measured_mixed(pair)"
_TYPES = {"pair": str, "hardware": dict, "sampling": str, "doubts": list}


@dataclass(frozen=True)
class DraftCosts:
    """Seconds of a draft's tokens.

    Attributes:
        name: of the draft.
        free: whether its proposals cost microseconds, so that they may be looked at without being asked for.
        reading_seconds: seconds of the step that reads so many unread tokens of context (1 or more) in one pass, and
            proposes the next token. A chain of k tokens takes `reading(unread) + (k - 1) * reading(1)`.
        chances: how often its tokens are kept, by their confidence, for whoever chooses; None where it was not counted.
            It depends on the texts, and not on the machine.

    Raises:
        LatencyProfileError: the table is empty, or seconds are not finite and positive.
    """

    name: str
    free: bool
    reading_seconds: Mapping[int, float]
    chances: KeepChances | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and type(self.free) is bool):
            raise LatencyProfileError(f"a draft has a name, and is free or not, got {self.name!r} and {self.free!r}")
        object.__setattr__(self, "reading_seconds", checked_seconds("reading_seconds", self.reading_seconds, 1))

    def reading(self, tokens: int) -> float:
        """Seconds of reading so many tokens, 1 or more, and proposing one; linear between and beyond those measured."""
        return interpolated(self.reading_seconds, tokens, 1)


@dataclass(frozen=True)
class MixedProfile:
    """Seconds of drafting by any of several drafts, and of verifying; one text at a time.

    Attributes:
        pair: name of the pair.
        drafts: costs of its drafts, in the order of the pair.
        target_seconds: seconds of a target pass over so many tokens (1 or more) and its verification, by number.
        autoregressive_seconds: seconds per token of plain decoding with the target.
        hardware: what it was measured on, as in `LatencyProfile`.
        sampling: which arithmetic was measured, likewise.
        context: tokens of the text that were read before; None where it is not known.
        spread: relative interquartile range of the times of one size, as in `Uncertainty`; 0 where it is not known.
        doubts: what contradicted itself when it was measured, a clause each; none for a profile to be trusted.

    Raises:
        LatencyProfileError: there is no draft, a table is empty, or seconds are not finite and positive.
    """

    pair: str
    drafts: tuple[DraftCosts, ...]
    target_seconds: Mapping[int, float]
    autoregressive_seconds: float
    hardware: Mapping[str, Any]
    sampling: str = "greedy"
    context: int | None = None
    spread: float = 0.0
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafts", tuple(self.drafts))
        if not self.drafts:
            raise LatencyProfileError(f"the mixed latency profile of {self.pair} has no draft")
        object.__setattr__(self, "target_seconds", checked_seconds("target_seconds", self.target_seconds, 1))
        check_fields(self, partial(number, above=0, error=LatencyProfileError), "autoregressive_seconds")
        check_fields(self, partial(number, at_least=0, error=LatencyProfileError), "spread")
        if self.context is not None:
            check_fields(self, partial(whole_number, error=LatencyProfileError), "context")
        object.__setattr__(self, "hardware", dict(self.hardware))
        object.__setattr__(self, "doubts", tuple(map(str, self.doubts)))

    def reading(self, draft: int, tokens: int) -> float:
        """Seconds of the step in which a draft, by its number, reads so many tokens (1 or more) and proposes one."""
        return self.drafts[draft].reading(tokens)

    def target(self, tokens: int) -> float:
        """Seconds of a target pass over so many tokens, 1 or more, verification included; linear likewise."""
        return interpolated(self.target_seconds, tokens, 1)

    @property
    def target_cost_ratio(self) -> float:
        """Cost of one more token in a target pass, over a plain token: fitted from 1 token to 17; at least 0."""
        centred = range(-8, 9)
        slope = sum(place * self.target(place + 9) for place in centred) / sum(place * place for place in centred)
        return max(0.0, slope) / self.autoregressive_seconds

    @property
    def cost_ratios(self) -> tuple[float, ...]:
        """Cost of a token of each draft in a round, over a plain token, if the draft has nothing else to read."""
        target = self.target_cost_ratio
        return tuple(draft.reading(1) / self.autoregressive_seconds + target for draft in self.drafts)

    @property
    def chances(self) -> NDArray[np.float64]:
        """Shares of the tokens of each draft that pass the exact test, shape (drafts, `BINS` + 1).

        See `KeepChances.exact`. Where they were not counted, those of a draft of which nothing was measured.
        """
        return np.array([(draft.chances or KeepChances.assumed()).exact for draft in self.drafts])

    def with_chances(self, chances: Sequence[KeepChances | None]) -> MixedProfile:
        """Return the profile with how often tokens of each draft are kept, in order; counted ones stay as they are."""
        drafts = [
            draft if draft.chances else replace(draft, chances=counted)
            for draft, counted in zip(self.drafts, chances, strict=True)
        ]
        return replace(self, drafts=tuple(drafts))

    def require_drafts(self, names: tuple[str, ...]) -> MixedProfile:
        """Return the profile itself, if it is of these drafts, in this order.

        Raises:
            LatencyProfileError: it is of others; the message names both.
        """
        known = tuple(draft.name for draft in self.drafts)
        if known != names:
            raise LatencyProfileError(
                f"the mixed latency profile of {self.pair} is of the drafts {', '.join(known)}, and charged are to be "
                f"{', '.join(names)}; {_WAY_OUT}"
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; a reader never sees half a file."""
        content = {
            **asdict(self),
            "drafts": [
                {
                    "name": draft.name,
                    "free": draft.free,
                    "reading_seconds": [*draft.reading_seconds.items()],
                    "chances": draft.chances and draft.chances.to_json(),
                }
                for draft in self.drafts
            ],
            "target_seconds": [*self.target_seconds.items()],  # JSON would make strings of the numbers of tokens
        }
        write_sealed(path, {"format": FORMAT, **content})

    @classmethod
    def load(cls, path: str | Path) -> MixedProfile:
        """Read a profile.

        Raises:
            LatencyProfileError: the file is missing, damaged, or not one of `save`.
        """
        content = profile_content(path, "mixed latency profile", _WAY_OUT, FORMAT)
        try:
            for name, kind in _TYPES.items():
                if not isinstance(content[name], kind):
                    raise ValueError(f"{name} is of another type")
            drafts = tuple(
                DraftCosts(
                    draft["name"],
                    draft["free"],
                    dict(draft["reading_seconds"]),
                    None if draft.get("chances") is None else KeepChances.from_json(draft["chances"]),
                )
                for draft in content.pop("drafts")
            )
            return cls(**{**content, "drafts": drafts, "target_seconds": dict(content["target_seconds"])})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LatencyProfileError(f"mixed latency profile {path} is damaged ({error}); {_WAY_OUT}") from error


@dataclass(frozen=True)
class ChoiceCharges:
    """Seconds of the steps of drafting with several drafts, and of verifying.

    Attributes:
        drafting: of a token, by the draft and the tokens that it reads for it, shape (drafts, most tokens + 1). Those
            of a free draft are all the same.
        verifying: of the target's pass, by the tokens drafted before, shape (longest draft + 1,).
        decision_seconds: of every decision at which a draft could go on.
        autoregressive_seconds: of a token of plain decoding.
        profile: by which they were computed.
    """

    drafting: NDArray[np.float64]
    verifying: NDArray[np.float64]
    decision_seconds: float
    autoregressive_seconds: float
    profile: MixedProfile

    @classmethod
    def of(
        cls, profile: MixedProfile, max_draft_length: int, max_new_tokens: int, decision_seconds: float = 0.0
    ) -> ChoiceCharges:
        """Compute the charges by the latency profile of a pair with several drafts.

        Args:
            profile: of the pair and the hardware.
            max_draft_length: longest draft, in tokens, at least 1.
            max_new_tokens: tokens of a text, at most.
            decision_seconds: time that deciding takes, at least 0.

        Raises:
            ValueError: `decision_seconds` is negative or not finite.
        """
        most = max_new_tokens + max_draft_length
        drafting = [
            [profile.reading(place, 1 if draft.free else max(tokens, 1)) for tokens in range(most + 1)]
            for place, draft in enumerate(profile.drafts)
        ]
        verifying = np.array([profile.target(drafted + 1) for drafted in range(max_draft_length + 1)])
        return cls(
            np.array(drafting),
            verifying,
            number("decision_seconds", decision_seconds, at_least=0),
            profile.autoregressive_seconds,
            profile,
        )
