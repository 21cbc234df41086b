"""Guidance of a growing tree beside the draft's probabilities: aligned states, and a predictor on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.identity import weights_digest
from ...models.language_model import LanguageModel
from ...models.output_head import OutputLayer, output_layer
from .alignment import AffineAlignment, DraftTreeModelError, proposals
from .predictor import AcceptancePredictor, NodeFeatures


class Aligned(NamedTuple):
    """The draft's states as the target might have them."""

    states: Tensor
    """Shape (nodes, the target's hidden size), float32."""
    logits: Tensor | None
    """Scores of the target's output layer for them, shape (nodes, vocabulary), float32; None if not needed."""


@dataclass(frozen=True)
class Guidance:
    """Alignment and predictor that a decoder uses beside its draft.

    Attributes:
        alignment: of the draft's hidden states to the target's.
        weight: share of the aligned states' proposals in what is drafted from, 0 to 1.
        predictor: of acceptance.
        output: the target's output layer, where somebody asks for what it makes of aligned states.
    """

    alignment: AffineAlignment | None = None
    weight: float = 0.0
    predictor: AcceptancePredictor | None = None
    output: OutputLayer | None = None

    @classmethod
    def checked(
        cls,
        draft: LanguageModel,
        target: LanguageModel,
        alignment: AffineAlignment | None,
        weight: float,
        predictor: AcceptancePredictor | None,
    ) -> Guidance:
        """Check that alignment, predictor and draft fit together.

        Raises:
            ValueError: the weight is not in [0, 1], or there is no alignment for what reads aligned states.
            DraftTreeModelError: alignment or predictor are of other widths than the models.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"alignment_weight is a share, 0 to 1, got {weight}")
        if alignment is None:
            if weight or predictor is not None:
                what = "alignment_weight" if weight else "a predictor"
                raise ValueError(f"{what} needs aligned states: give an alignment, too")
            return cls()
        for whose, expected, actual in (
            (draft, draft.hidden_size, alignment.draft_size),
            (target, target.hidden_size, alignment.target_size),
            (target, target.hidden_size, target.hidden_size if predictor is None else predictor.shape.hidden_size),
        ):
            if expected != actual:
                raise DraftTreeModelError(
                    f"{whose.name} has states of width {expected}, but the alignment or predictor is for {actual}; "
                    "fit them for this pair: python -m specgym.decoding.fit alignment (then acceptance) --draft ... "
                    "--target ..."
                )
        asked = weight > 0 or (predictor is not None and predictor.shape.aligned_scores)
        on = target.device
        return cls(
            alignment.to(on).eval(),
            weight,
            None if predictor is None else predictor.to(on).eval(),
            output_layer(target.model) if asked else None,
        )

    @property
    def needs_states(self) -> bool:
        """True if the draft's hidden states are needed."""
        return self.weight > 0 or self.predictor is not None

    def digest(self) -> str:
        """Return a SHA-256 over alignment, its weight and predictor, 64 hex digits; empty without an alignment."""
        if self.alignment is None:  # which all else reads
            return ""
        known = f"{weights_digest(self.alignment)} {self.weight}"
        if self.predictor is not None:
            known += f" {self.predictor.shape} {weights_digest(self.predictor)}"
        return hashlib.sha256(known.encode()).hexdigest()

    def align(self, states: Tensor | None) -> Aligned | None:
        """Map the draft's states, shape (nodes, the draft's hidden size), on the target's device."""
        if self.alignment is None or states is None:
            return None
        mapped = self.alignment(states)
        return Aligned(mapped, None if self.output is None else proposals(mapped, self.output))

    def predict(self, scores: Tensor, aligned: Aligned | None, children: Tensor, depth: int) -> Tensor | None:
        """Predicted acceptance of children after their parent's, shape (nodes, children); None without a predictor.

        Args:
            scores: the draft's logits after each node, shape (nodes, vocabulary).
            aligned: states of the same nodes.
            children: tokens, shape (nodes, children).
            depth: of the children, 1 for those of the root.
        """
        if self.predictor is None or aligned is None:
            return None
        width = children.shape[1]
        logs = scores.log_softmax(-1)
        features = NodeFeatures(
            hidden=aligned.states.repeat_interleave(width, 0),
            log_probability=logs.gather(-1, children).flatten(),
            entropy=torch.special.entr(logs.exp()).sum(-1).repeat_interleave(width),
            depth=torch.full((children.numel(),), float(depth), device=children.device),
            aligned_log_probability=None
            if aligned.logits is None
            else aligned.logits.log_softmax(-1).gather(-1, children).flatten(),
        )
        return self.predictor.predict(features).reshape(children.shape)
