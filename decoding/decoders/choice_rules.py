"""Rules that choose, token by token, which of several drafts goes on, or that the target verifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .stop_rules import Rows

MOST_DRAFTS = 6
"""Drafts that a pair may have where a rule chooses among them."""


class ChoiceRule(ABC):
    """Says before every token of a draft who proposes it. One rule may serve many texts side by side.

    Whatever it says, the text is the target's, because a token that was drafted is verified.

    Attributes:
        looks_at_entropy: whether the rule needs that feature, or the probability of the drawn token; live decoding may
            leave them at 0 and 1 for one that does not.
    """

    looks_at_entropy: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the rule in tables, with its parameters."""

    @abstractmethod
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Choose.

        Args:
            features: shape (environments, features), columns as in `CHOICE_FEATURES`; not to be changed or kept.

        Returns:
            Shape (environments,): 0 to let the target verify what there is (with nothing drafted it emits a token
            alone), or 1 to `MOST_DRAFTS` to let that draft propose the next token. A draft that cannot means 0.
        """

    def start(self, environments: int, seed: int | None) -> None:  # noqa: B027 (most rules have nothing to prepare)
        """Forget what was learned, and prepare for so many texts; called once by the rule's owner, not at each text.

        Args:
            environments: how many texts `features` will have.
            seed: fixes any random choice.
        """

    def verified(  # noqa: B027 (most rules do not learn)
        self, rows: Rows, emitted: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        """Rounds are over, for rules that learn from what they brought.

        Args:
            rows: the texts concerned.
            emitted: tokens that each round emitted, shape (rows,).
            seconds: what each took, drafting and verification.
        """
