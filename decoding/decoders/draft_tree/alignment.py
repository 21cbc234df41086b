"""An affine map from a draft's hidden states to its target's, fitted in closed form over any amount of text.

Both states are those after the final norm, which the output layers read. What the target's output layer says of a
mapped state is a guess at the target's own distribution, made before the target has read anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import SpecgymError, number
from ...models.output_layer import OutputLayer


class DraftTreeModelError(SpecgymError, ValueError):
    """An alignment or acceptance predictor that cannot be used; the message names it and the way out."""


class OtherModelsError(DraftTreeModelError):
    """It is whole, and was made for other models."""


class AffineAlignment(nn.Module):
    """h_target = W h_draft + b.

    Args:
        draft_size: width of the draft's hidden states.
        target_size: width of the target's.

    Attributes:
        weight: W, shape (target_size, draft_size), float32; at first 1 on its diagonal and 0 elsewhere.
        bias: b, shape (target_size,), float32; 0 at first.
    """

    def __init__(self, draft_size: int, target_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(target_size, draft_size))
        self.bias = nn.Parameter(torch.zeros(target_size))

    @property
    def draft_size(self) -> int:
        """Width of the draft's hidden states."""
        return self.weight.shape[1]

    @property
    def target_size(self) -> int:
        """Width of the target's hidden states."""
        return self.weight.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states.

        Args:
            hidden: of the draft, after its final norm, shape (..., draft_size), of any precision.

        Returns:
            Shape (..., target_size), in the precision of the map.

        Raises:
            DraftTreeModelError: the states have another width.
        """
        if hidden.shape[-1] != self.draft_size:
            raise DraftTreeModelError(
                f"this alignment maps states of width {self.draft_size}, and those given have {hidden.shape[-1]}; fit "
                "one for this draft: python -m specgym.decoding.fit alignment --draft ... --target ..."
            )
        return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def proposals(aligned: Tensor, output: OutputLayer) -> Tensor:
    """Proposals of the target's output layer from states that an alignment has mapped.

    Args:
        aligned: mapped states, shape (n, target_size).
        output: of the target (`specgym.decoding.decoders.medusa.heads.output_layer`).

    Returns:
        Logits, shape (n, vocabulary), float32.
    """
    scores: Tensor = output.layer(aligned.to(output.weight.dtype))
    return scores.float()


class RidgeFit:
    """Fits an alignment in closed form, and keeps no more than sums of the states that it is shown.

    The squared error plus ``penalty`` times the squared weights is lowest where
    W = (sum of centred y x^T) (sum of centred x x^T + penalty)^-1; the bias is not penalised (Hoerl and Kennard, "Ridge
    Regression: Biased Estimation for Nonorthogonal Problems", 1970).

    Args:
        draft_size: width of the draft's hidden states.
        target_size: width of the target's.

    Attributes:
        count: pairs of states seen.
    """

    def __init__(self, draft_size: int, target_size: int) -> None:
        self.count = 0
        self._draft_sum = torch.zeros(draft_size, dtype=torch.float64)
        self._target_sum = torch.zeros(target_size, dtype=torch.float64)
        self._gram = torch.zeros(draft_size, draft_size, dtype=torch.float64)
        self._cross = torch.zeros(draft_size, target_size, dtype=torch.float64)

    def add(self, draft_states: Tensor, target_states: Tensor) -> None:
        """Count pairs of states of the same positions.

        Args:
            draft_states: shape (n, draft_size), of any precision.
            target_states: shape (n, target_size).

        Raises:
            ValueError: the shapes do not fit.
        """
        expected = (len(draft_states), len(self._draft_sum)), (len(draft_states), len(self._target_sum))
        actual = tuple(draft_states.shape), tuple(target_states.shape)
        if actual != expected:
            raise ValueError(
                f"states must have the shapes {expected[0]} and {expected[1]}, got {actual[0]} and {actual[1]}"
            )
        draft, target = draft_states.detach().to("cpu", torch.float64), target_states.detach().to("cpu", torch.float64)
        self.count += len(draft)
        self._draft_sum += draft.sum(0)
        self._target_sum += target.sum(0)
        self._gram += draft.T @ draft
        self._cross += draft.T @ target

    def solve(self, penalty: float = 1e-3) -> AffineAlignment:
        """The alignment with the lowest error over all that was added.

        Args:
            penalty: of the weights, at least 0, as a multiple of the mean variance of the draft's features times
                their number, so that it means the same for every draft and amount of text.

        Raises:
            ValueError: the penalty is negative.
            DraftTreeModelError: too little was added to determine the map.
        """
        penalty = number("penalty", penalty, at_least=0)
        if not self.count:
            raise DraftTreeModelError("no states were added, so there is no map to fit: call add first")
        draft_mean, target_mean = self._draft_sum / self.count, self._target_sum / self.count
        gram = self._gram - self.count * torch.outer(draft_mean, draft_mean)
        cross = self._cross - self.count * torch.outer(draft_mean, target_mean)
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise DraftTreeModelError(
                f"{self.count} pairs of states do not determine a map of {len(draft_mean)} features: give more text, "
                "or a larger penalty"
            )
        weight = torch.cholesky_solve(cross, factor).T
        alignment = AffineAlignment(len(draft_mean), len(target_mean))
        with torch.no_grad():
            alignment.weight.copy_(weight)
            alignment.bias.copy_(target_mean - weight @ draft_mean)
        return alignment
