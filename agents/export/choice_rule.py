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

    A call for one text takes about 25 microseconds with two layers of 48. The scaling is folded into the first layer.

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
        of_draft, by_draft = middle[_COMMON:].reshape(shape)[0], spread[_COMMON:].reshape(shape)[0]
        slot, others = (self.weights[f"{name}.weight"].astype(np.float64) for name in ("slot", "others"))
        if slot.shape != (outputs, _OF_DRAFT) or others.shape != slot.shape:
            raise ValueError(f"slot and others have shapes {slot.shape} and {others.shape} for {outputs} outputs")
        slot, others = slot / by_draft, others / by_draft
        self._bias = (bias - weight @ middle[:_COMMON] - slot @ of_draft).astype(np.float32)
        # Besides the sum of the drafts' features comes that of their middles, as many as can go on.
        others = np.column_stack([others, -others @ of_draft]) / MOST_DRAFTS
        self._common, self._slot, self._others = (
            np.ascontiguousarray(matrix.T, np.float32) for matrix in (weight, slot, others)
        )
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
        return [len(self._bias), *(len(bias) for _, bias in self._layers)]

    def __call__(self, features: Array) -> NDArray[np.int64]:
        """Choose, like any rule."""
        scores = self.scores(features)
        best = scores.argmax(1)
        return np.where(scores[np.arange(len(scores)), best] > 0, best + 1, 0)

    def scores(self, features: Array) -> Array:
        """Logarithm of how much likelier each draft is than to verify, shape (environments, `MOST_DRAFTS`).

        Minus infinity where a draft cannot go on.
        """
        drafts = features[:, _COMMON:].reshape(-1, MOST_DRAFTS, _OF_DRAFT)
        available = drafts[:, :, AVAILABLE] > 0.5
        pooled = np.empty((len(features), _OF_DRAFT + 1), np.float32)
        np.einsum("nd,ndf->nf", available, drafts, out=pooled[:, :-1])
        pooled[:, -1] = available.sum(1)
        shared = features[:, :_COMMON] @ self._common + pooled @ self._others + self._bias
        hidden = np.tanh(drafts @ self._slot + shared[:, None])
        for weight, bias in self._layers:
            hidden = np.tanh(hidden @ weight + bias)
        result: Array = np.where(available, hidden @ self._score + self._offset, np.float32(-np.inf))
        return result
