"""A small network that says how likely a target will accept a candidate token, before the target reads anything.

It begins as the draft's own probability: the network's output is added to that probability's log-odds, and is 0 until
it is trained. One temperature, fitted on text kept apart, then makes the probabilities mean what they say (Guo et al.,
"On Calibration of Modern Neural Networks", arXiv 1706.04599).

Guidance of a growing tree beside the draft's probabilities: aligned states, and a predictor on them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import check_fields, one_of, whole_number
from ...models.identity import weights_digest
from ...models.language_model import LanguageModel
from ...models.output_layer import OutputLayer, output_layer
from .alignment import AffineAlignment, DraftTreeModelError, proposals

Label = Literal["match", "probability", "ratio"]
LABELS: tuple[Label, ...] = ("match", "probability", "ratio")
_SMALLEST_COMPLEMENT = 1e-6  # of a probability near 1, whose log-odds would be infinite in float32
_SMALLEST_LOG = -30.0  # of a probability


class NodeFeatures(NamedTuple):
    """Features of n candidate tokens before the target reads them; an entry a candidate."""

    hidden: Tensor
    """The draft's state at the position that proposes the candidate, aligned; shape (n, target width)."""
    log_probability: Tensor
    """Log-probability of the candidate under the draft at temperature 1, in nats, shape (n,)."""
    entropy: Tensor
    """Entropy of that distribution, in nats, shape (n,)."""
    depth: Tensor
    """1 for a child of the root, 2 for its children, ...; shape (n,), of any number type."""
    aligned_log_probability: Tensor | None = None
    """Log-probability by the target's output layer on the aligned state, in nats, shape (n,); None where that is not
    computed."""


@dataclass(frozen=True)
class PredictorShape:
    """Layers and inputs of a predictor, and the event that it predicts.

    Attributes:
        hidden_size: width of the aligned states, that of the target.
        label: what "accepted" meant in training. ``match``: the token is the target's likeliest, as a greedy verifier
            demands. ``probability``: the target's probability of it, with which deterministic children are accepted
            when sampling. ``ratio``: min(1, target / draft), for children drawn independently.
        deepest: depth of the deepest nodes in training, at least 1; deeper ones are taken for such.
        width: of the two hidden layers.
        aligned_scores: whether it reads `NodeFeatures.aligned_log_probability`.
    """

    hidden_size: int
    label: Label = "match"
    deepest: int = 4
    width: int = 64
    aligned_scores: bool = True

    def __post_init__(self) -> None:
        check_fields(self, partial(whole_number, error=DraftTreeModelError), "hidden_size", "deepest", "width")
        one_of("label", self.label, LABELS, DraftTreeModelError)


class AcceptancePredictor(nn.Module):
    """The probability that the target accepts a candidate, given that it has accepted the candidate's parent.

    Args:
        shape: what it is made of.

    Attributes:
        shape: as given.
        temperature: by which log-odds are divided in `predict`; a tensor without dimensions, 1 until calibrated.
    """

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(shape.hidden_size + (6 if shape.aligned_scores else 4), shape.width)
        self.middle = nn.Linear(shape.width, shape.width)
        self.output = nn.Linear(shape.width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, features: NodeFeatures) -> Tensor:
        """Log-odds of acceptance before calibration, shape (n,), float32.

        Args:
            features: of n candidates; `NodeFeatures.aligned_log_probability` must be there if the shape says so.

        Raises:
            ValueError: it is not.
        """
        # Few and small tensors: on a CPU the time goes into the number of operations.
        known = [features.log_probability]
        if self.shape.aligned_scores:
            if features.aligned_log_probability is None:
                raise ValueError(
                    "this predictor reads aligned_log_probability: compute the target's output layer on aligned states "
                    "(draft_tree.proposals), or train one with --no-aligned-scores"
                )
            known.append(features.aligned_log_probability)
        logs = torch.stack(known, dim=-1).float().clamp(min=_SMALLEST_LOG)
        odds = log_odds(logs)
        rest = torch.stack([features.entropy.float(), features.depth.float().clamp(max=self.shape.deepest)], dim=-1)
        # Widths and norms of states differ from model to model; without a scale, training would depend on them.
        state = functional.layer_norm(features.hidden.float(), (self.shape.hidden_size,))
        first = functional.silu(self.first(torch.cat([state, logs, odds, rest], dim=-1)))
        return odds[:, 0] + self.output(functional.silu(self.middle(first)))[:, 0]

    def predict(self, features: NodeFeatures) -> Tensor:
        """Calibrated probabilities of acceptance, shape (n,), float32. Errors as for `forward`."""
        return torch.sigmoid(self(features) / self.temperature)


def log_odds(log_probability: Tensor) -> Tensor:
    """Log-odds of probabilities from their logarithms, finite also at 1, of equal shape."""
    return log_probability - torch.log((-torch.expm1(log_probability)).clamp(min=_SMALLEST_COMPLEMENT))


def calibrating_temperature(odds: Tensor, labels: Tensor) -> float:
    """The temperature by which log-odds are to be divided so that the negative log-likelihood is lowest.

    Args:
        odds: log-odds, shape (n,).
        labels: what they should have predicted, from 0 to 1, shape (n,).

    Returns:
        Between 0.05 and 20. The likelihood is convex in the inverse of it, so a search by thirds finds the lowest.
    """
    values, expected = odds.double(), labels.double()
    low, high = 1 / 20, 20.0
    for _ in range(60):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        losses = [
            float(functional.binary_cross_entropy_with_logits(values * scale, expected)) for scale in (first, second)
        ]
        low, high = (low, second) if losses[0] < losses[1] else (first, high)
    return 2 / (low + high)


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
