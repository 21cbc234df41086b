"""A learned choice of drafts as a rule to decode with: safetensors and JSON, evaluated by NumPy in microseconds.

The function that the two files hold, of the features that `specgym.decoding.decoders.choice_features` lists: those that
all drafts have in common, and behind them those of each draft, whose first one says whether it can go on:

    scaled = (features - middle) / spread
    pooled = sum of a draft's scaled features, over drafts that can go on, / number of drafts that a pair may have
    hidden = tanh(common_weight * common + common_bias + others_weight * pooled + slot_weight * draft)    for each draft
    hidden = tanh(weight * hidden + bias)                                                     for every further layer
    score  = score_weight * hidden + score_bias

The draft with the largest score proposes the next token, if that is above 0; else the target verifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from specgym.decoding import CHOICE_FEATURES, FEATURES, MOST_DRAFTS, SLOT_FEATURES, ChoiceRule

from ..experiments.control.choice_policy import AVAILABLE, ChoicePolicy
from .control_rule import Array, ExportedRule, hidden_layers, layer_of, require_weights, scaling
from .knob_policy import as_arrays, layer_tensors

_COMMON, _OF_DRAFT = len(FEATURES), len(SLOT_FEATURES)


class ExportedChoiceRule(ExportedRule, ChoiceRule):
    """Learned policy that chooses drafts.

    A call for one text takes about 17 microseconds with two layers of 48. The scaling is folded into the first layer.

    Args:
        weights: ``middle``, ``spread``, ``common.weight``, ``common.bias``, ``slot.weight``, ``others.weight``,
            ``hidden.<n>.weight``, ``hidden.<n>.bias``, ``score.weight``, ``score.bias``.

    Raises:
        ValueError: a weight is missing, does not fit, or is not finite.
    """

    FORMAT: ClassVar = "specgym-choice-rule-1"
    KIND: ClassVar = "choice of drafts"
    FEATURES: ClassVar = CHOICE_FEATURES

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(weights)
        layers = hidden_layers(self.weights)
        biased = ("common", *layers, "score")
        require_weights(
            self.weights,
            {"middle", "spread", "slot.weight", "others.weight"}
            | {f"{name}.{part}" for name in biased for part in ("weight", "bias")},
        )
        middle, spread = scaling(self.weights, len(CHOICE_FEATURES))
        if len(middle) != len(CHOICE_FEATURES):
            raise ValueError(f"the scaling must be of shape ({len(CHOICE_FEATURES)},)")
        weight, bias, outputs = layer_of(self.weights, "common", _COMMON)
        weight = weight / spread[:_COMMON]
        shape = MOST_DRAFTS, _OF_DRAFT
        of_draft, spread_of = middle[_COMMON:].reshape(shape)[0], spread[_COMMON:].reshape(shape)[0]
        slot, others = (self.weights[f"{name}.weight"].astype(np.float64) for name in ("slot", "others"))
        if slot.shape != (outputs, _OF_DRAFT) or others.shape != slot.shape:
            raise ValueError(f"slot and others have shapes {slot.shape} and {others.shape} for {outputs} outputs")
        slot, others = slot / spread_of, others / spread_of
        # One product of a draft's features serves for itself and, in the second half, for the sum over all drafts.
        self._width = outputs
        self._common = np.ascontiguousarray(weight.T, np.float32)
        self._drafts = np.ascontiguousarray(np.concatenate([slot, others / MOST_DRAFTS]).T, np.float32)
        self._bias = np.concatenate(
            [bias - weight @ middle[:_COMMON] - slot @ of_draft, -others @ of_draft / MOST_DRAFTS]
        ).astype(np.float32)
        self._layers: list[tuple[Array, Array]] = []
        for name in layers:
            weight, bias, outputs = layer_of(self.weights, name, outputs)
            self._layers.append((np.ascontiguousarray(weight.T, np.float32), bias.astype(np.float32)))
        weight, bias, _ = layer_of(self.weights, "score", outputs, 1)
        self._score, self._offset = weight[0].astype(np.float32), np.float32(bias[0])

    @classmethod
    def of(cls, policy: ChoicePolicy) -> ExportedChoiceRule:
        """Take the network that scores drafts, and its scaling, out of a trained policy."""
        scores = policy.scores
        columns = len(CHOICE_FEATURES)
        weights = {
            "middle": policy.scaler.middle[:columns],
            "spread": policy.scaler.spread[:columns],
            "slot.weight": scores.slot.weight,
            "others.weight": scores.others.weight,
        }
        hidden = [layer for layer in scores.hidden if isinstance(layer, nn.Linear)]
        layers = {f"hidden.{number}": layer for number, layer in enumerate(hidden)}
        return cls(as_arrays(weights | layer_tensors({"common": scores.common, **layers, "score": scores.score})))

    @property
    def hidden(self) -> list[int]:
        """Widths of the hidden layers."""
        return [self._width, *(len(bias) for _, bias in self._layers)]

    def __call__(self, features: Array) -> NDArray[np.int64]:
        """Choose, like any rule."""
        scores = self.scores(features)
        return np.where(scores.max(1) > 0, scores.argmax(1) + 1, 0)

    def scores(self, features: Array) -> Array:
        """Logarithm of how much likelier each draft is than to verify, shape (environments, `MOST_DRAFTS`).

        Minus infinity where a draft cannot go on.
        """
        drafts = features[:, _COMMON:].reshape(-1, _OF_DRAFT)
        available = drafts[:, AVAILABLE].reshape(-1, 1, MOST_DRAFTS)
        both = drafts.dot(self._drafts)
        both += self._bias
        by_draft = both.reshape(-1, MOST_DRAFTS, 2 * self._width)
        shared = available @ by_draft[:, :, self._width :]
        shared += features[:, None, :_COMMON] @ self._common
        hidden = (by_draft[:, :, : self._width] + shared).reshape(-1, self._width)
        np.tanh(hidden, hidden)
        for weight, bias in self._layers:
            hidden = hidden.dot(weight)
            hidden += bias
            np.tanh(hidden, hidden)
        scores: Array = (hidden.dot(self._score) + self._offset).reshape(-1, MOST_DRAFTS)
        scores[available[:, 0] < 0.5] = -np.inf
        return scores
