"""A learned policy as a rule to decode with: safetensors and JSON, evaluated by NumPy in microseconds.

The function that the two files hold, of the features that `specgym.decoding.decoders.stop_rules.FEATURES` lists:

    hidden = (features - middle) / spread
    hidden = tanh(weight * hidden + bias)                    for every hidden layer
    stop   = stop_weight * hidden + stop_bias > 0
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from specgym.decoding import FEATURES, StopRule

from ..experiments.control.stop_policy import OneSidedNetworks, StoppingPolicy, UsualScaler
from ..training.run_folder import DESCRIPTION_FILE, WEIGHTS_FILE, RunFileError
from .knob_policy import as_arrays, layer_tensors, load_description, load_weights, save_network

FORMAT = "specgym-stop-rule-2"
_UNSEALED = "specgym-stop-rule-1"  # has no checksum
_WAY_OUT = "remove its folder, and python train.py --resume <run> learns it again"

Array = NDArray[np.float32]


class ExportedStopRule(StopRule):
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

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.weights = {name: np.asarray(array, dtype=np.float32) for name, array in weights.items()}
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
    def name(self) -> str:
        """`learned`."""
        return "learned"

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

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``, each of them whole or not at all."""
        description = {
            "format": FORMAT,
            "about": (__doc__ or "").strip(),
            "features": [asdict(feature) for feature in FEATURES[: len(self.weights["middle"])]],
            "hidden": [len(bias) for _, bias in self._layers],
        }
        save_network(folder, self.weights, description)

    @classmethod
    def load(cls, folder: str | Path) -> ExportedStopRule:
        """Read what `save` wrote.

        Raises:
            RunFileError: a file is missing, damaged, of another format, or for other features.
        """
        described, weights_path = Path(folder) / DESCRIPTION_FILE, Path(folder) / WEIGHTS_FILE
        content = load_description(Path(folder), FORMAT, _UNSEALED, "stop rule", _WAY_OUT)
        try:
            known = [(feature["name"], feature["low"], feature["high"]) for feature in content["features"]]
        except (KeyError, TypeError) as error:
            raise RunFileError(f"{described} is damaged ({error!r}); {_WAY_OUT}") from error
        # Features are only ever added at the end, so an earlier rule sees the first of them.
        if known != [(feature.name, feature.low, feature.high) for feature in FEATURES][: len(known)]:
            raise RunFileError(f"{described} is for other features than this version's; {_WAY_OUT}")
        try:
            rule = cls(load_weights(Path(folder), _WAY_OUT))
        except RunFileError:
            raise
        except ValueError as error:
            raise RunFileError(f"{weights_path} holds no stop rule ({error}); {_WAY_OUT}") from error
        if content.get("hidden") != [len(bias) for _, bias in rule._layers]:
            raise RunFileError(f"{described} does not fit {weights_path}; {_WAY_OUT}")
        return rule


def _folded(weights: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """Transposed weight and bias of every layer, for features as they are.

    Raises:
        ValueError: a weight is missing, too many, does not fit, or is not finite.
    """
    hidden = sum(name.startswith("hidden.") and name.endswith(".weight") for name in weights)
    if not hidden:
        raise ValueError("there is no hidden layer")
    names = [*(f"hidden.{number}" for number in range(hidden)), "stop"]
    expected = {"middle", "spread"} | {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    if set(weights) != expected:
        raise ValueError(f"weights that do not match: {', '.join(sorted(set(weights) ^ expected))}")
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise ValueError("a weight is NaN or infinite")
    middle, spread = weights["middle"].astype(np.float64), weights["spread"].astype(np.float64)
    inputs = middle.size
    if not (middle.shape == spread.shape == (inputs,) and 0 < inputs <= len(FEATURES) and (spread > 0).all()):
        raise ValueError(f"the scaling must be positive and of shape ({len(FEATURES)},), or shorter in earlier files")
    layers: list[tuple[Array, Array]] = []
    for name in names:
        weight, bias = (weights[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        outputs = 1 if name == "stop" else len(bias)
        if bias.shape != (outputs,) or weight.shape != (outputs, inputs):
            raise ValueError(f"{name} has shapes {weight.shape} and {bias.shape} for {inputs} inputs")
        if not layers:
            weight = weight / spread
            bias = bias - weight @ middle
            weight = np.pad(weight, ((0, 0), (0, len(FEATURES) - inputs)))  # looks at no feature that was added since
        layers.append((np.ascontiguousarray(weight.T, np.float32), bias.astype(np.float32)))
        inputs = operator.index(outputs)
    return layers
