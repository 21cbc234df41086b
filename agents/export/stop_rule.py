"""A learned policy as a rule to decode with: safetensors and JSON, evaluated by NumPy in microseconds.

The function that the two files hold, of the features that `specgym.decoding.decoders.stop_rules.FEATURES` lists:

    hidden = (features - middle) / spread
    hidden = tanh(weight * hidden + bias)                    for every hidden layer
    stop   = stop_weight * hidden + stop_bias > 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from specgym.decoding import FEATURES, StopRule

from ..experiments.control.stop_policy import OneSidedNetworks, StoppingPolicy, UsualScaler
from .control_rule import Array, ExportedRule, hidden_layers, layer_of, require_weights, scaling
from .knob_policy import as_arrays, layer_tensors


class ExportedStopRule(ExportedRule, StopRule):
    """Learned policy that ends drafts.

    A call for one draft takes 3 to 8 microseconds with two layers of 32, depending on how busy the machine is, where a
    token of the shipped one-layer drafts takes 800: at most 1 %. A draft that is no model may cost as little as the
    rule itself, 5 microseconds a token for an n-gram table; there it is 0.2 % of a round of 5 ms for each token. The
    scaling is folded into the first layer, and the layers write into arrays that are made once for each number of
    drafts.

    Args:
        weights: ``middle``, ``spread``, ``hidden.<n>.weight``, ``hidden.<n>.bias``, ``stop.weight``, ``stop.bias``.

    Raises:
        ValueError: a weight is missing, does not fit, or is not finite.
    """

    FORMAT: ClassVar = "specgym-stop-rule-2"
    UNSEALED: ClassVar = "specgym-stop-rule-1"
    KIND: ClassVar = "stop rule"
    FEATURES: ClassVar = FEATURES

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(weights)
        *self._layers, (stop_weight, stop_bias) = _folded(self.weights)
        self._stop_weight, self._threshold = stop_weight[:, 0], -stop_bias[0]
        self._buffers = [np.empty((0, len(bias)), np.float32) for _, bias in self._layers]

    @classmethod
    def of(cls, policy: StoppingPolicy) -> ExportedStopRule:
        """Take the policy network and its scaling out of a trained policy.

        Raises:
            TypeError: the networks are not those of `StoppingPolicy`.
        """
        scaler, networks, head = policy.features_extractor, policy.mlp_extractor, policy.action_net
        if not (
            isinstance(scaler, UsualScaler) and isinstance(networks, OneSidedNetworks) and isinstance(head, nn.Linear)
        ):
            raise TypeError("only the networks of StoppingPolicy can be exported")
        columns = len(FEATURES)
        weights = {"middle": scaler.middle[:columns], "spread": scaler.spread[:columns]}
        layers = [layer for layer in networks.policy_net if isinstance(layer, nn.Linear)]
        weights |= layer_tensors({f"hidden.{number}": layer for number, layer in enumerate(layers)})
        # Of two actions the likelier has the larger logit, so their difference says all.
        weights["stop.weight"] = head.weight[1:] - head.weight[:1]
        weights["stop.bias"] = head.bias[1:] - head.bias[:1]
        return cls(as_arrays(weights))

    @property
    def hidden(self) -> list[int]:
        """Widths of the hidden layers."""
        return [len(bias) for _, bias in self._layers]

    def __call__(self, features: Array) -> NDArray[np.bool_]:
        """Decide whether to stop, like any rule."""
        return self._hidden(features).dot(self._stop_weight) > self._threshold

    def preference(self, features: Array) -> Array:
        """The logarithm of how much likelier stopping is than going on, shape (environments,)."""
        return self._hidden(features).dot(self._stop_weight) - self._threshold

    def _hidden(self, features: Array) -> Array:
        if len(self._buffers[0]) != len(features):
            self._buffers = [np.empty((len(features), len(bias)), np.float32) for _, bias in self._layers]
        hidden = features
        # Every operation here costs half a microsecond or less; operators and keywords would double that.
        for (weight, bias), buffer in zip(self._layers, self._buffers):  # noqa: B905
            hidden.dot(weight, buffer)
            np.add(buffer, bias, buffer)
            hidden = np.tanh(buffer, buffer)
        return hidden


def _folded(weights: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """Transposed weight and bias of every layer, for features as they are.

    Raises:
        ValueError: a weight is missing, too many, does not fit, or is not finite.
    """
    hidden = hidden_layers(weights)
    if not hidden:
        raise ValueError("there is no hidden layer")
    names = [*hidden, "stop"]
    require_weights(weights, {"middle", "spread"} | {f"{name}.{part}" for name in names for part in ("weight", "bias")})
    middle, spread = scaling(weights, len(FEATURES))
    inputs = len(middle)
    layers: list[tuple[Array, Array]] = []
    for name in names:
        weight, bias, inputs = layer_of(weights, name, inputs, 1 if name == "stop" else None)
        if not layers:
            weight = weight / spread
            bias = bias - weight @ middle
            weight = np.pad(weight, ((0, 0), (0, len(FEATURES) - len(middle))))  # features that were added since
        layers.append((np.ascontiguousarray(weight.T, np.float32), bias.astype(np.float32)))
    return layers
