"""The learned policy without any framework: weights as safetensors, everything else as JSON, evaluated by NumPy.

A Stable-Baselines3 zip is unpickled when it is loaded and can run code; these two files cannot. The function they hold:

    features = 2 * (state - low) / (high - low) - 1
    hidden   = tanh(weight * hidden + bias)                                   for every hidden layer
    mean     = tanh(mean_weight * hidden + mean_bias)
    std      = std_low * (std_high / std_low) ** sigmoid(std_weight * hidden + std_bias)
    knobs    = clip(knobs + step * clip(mean, -1, 1), knob_low, knob_high)    one step of tuning

where the step of a logarithmic knob is one of log2(1 + knob - knob_low).

A rule that chooses knobs round by round (`ExportedKnobRule`) is such a function of a text's features.

Files of an exported network: weights as safetensors, everything else as JSON, no code in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from specgym.decoding import (
    FILES,
    DamagedFileError,
    KnobError,
    KnobRule,
    RoundTracker,
    check_files,
    doublings,
    file_digests,
    from_doublings,
    replacing,
    round_features,
    write_sealed,
)
from specgym.envs import ACTION_KINDS

from ..policy import BoundsScaler, KnobPolicy
from ..training.run_folder import DESCRIPTION_FILE, WEIGHTS_FILE, RunFileError, read_json
from ..training.settings_io import Number, decoded, from_json

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, NDArray[Any]]


def layer_tensors(layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """``<name>.weight`` and ``<name>.bias`` of some layers."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return tensors


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Tensors as arrays of their own."""
    return {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in tensors.items()}


def save_network(folder: Path, weights: Weights, description: Mapping[str, Any]) -> None:
    """Write ``policy.safetensors`` and ``policy.json``, each whole or not at all; the second has the first's digest."""
    with replacing(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))
    write_sealed(folder / DESCRIPTION_FILE, {**description, FILES: file_digests(folder, [WEIGHTS_FILE])})


def load_description(folder: Path, expected: str, earlier: str, kind: str, way_out: str) -> dict[str, Any]:
    """Read the description that `save_network` wrote, and check the weights beside it against their digest.

    Args:
        folder: where it is.
        expected: its format.
        earlier: the same format from before it had a checksum.
        kind: what it should be, for messages.
        way_out: what to do where it is damaged, as the end of a sentence.

    Raises:
        RunFileError: a file is missing, damaged, or of another format.
    """
    path = folder / DESCRIPTION_FILE
    content = read_json(path, way_out, expected)
    if content.get("format") not in (expected, earlier):
        raise RunFileError(f"{path} is not an exported {kind} of this version ({expected}); {way_out}")
    try:
        check_files(folder, content, WEIGHTS_FILE)
    except (OSError, DamagedFileError) as error:
        raise RunFileError(f"{path} and the files that it describes do not fit ({error}); {way_out}") from error
    return content


def load_weights(folder: Path, way_out: str) -> dict[str, NDArray[Any]]:
    """Read the weights that `save_network` wrote. Raises RunFileError where they are missing or damaged."""
    path = folder / WEIGHTS_FILE
    try:
        weights: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:  # KeyError: a type NumPy lacks
        raise RunFileError(f"{path} is missing or damaged ({error}); {way_out}") from error
    return weights


FORMAT = "specgym-policy-2"
RULE_FORMAT = "specgym-knob-rule-1"
_UNSEALED = "specgym-policy-1"  # has no checksum
_WAY_OUT = "export the policy again: python train.py --resume <run>"


@dataclass(frozen=True)
class KnobRange:
    """Range of a knob: it starts at `default`, an action of 1 adds `step`, and it stays in [low, high].

    The step is one of log2(1 + knob - low) where the knob is `logarithmic`. The decoder gets the nearest whole number
    of one that is an `integer`.
    """

    name: str
    low: float
    high: float
    default: float
    step: float
    integer: bool = False
    logarithmic: bool = False

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> KnobRange:
        """Read a range from its fields as JSON. Raises KeyError, TypeError or ValueError for anything else."""
        knob = from_json(cls(stored["name"], 0.0, 0.0, 0.0, 0.0), stored, "a knob")
        numbers = [decoded(Number, stored[name], name) for name in ("low", "high", "default", "step")]
        if not (knob.low <= knob.high and knob.step > 0):
            raise ValueError(f"the knob {knob.name} has a range or a step that makes no sense: {numbers}")
        return knob

    def moved(self, value: float, action: float) -> float:
        """The value after an action in [-1, 1]."""
        if self.logarithmic:
            most = doublings(self.high, self.low)
            value = float(from_doublings(min(doublings(value, self.low) + self.step * action, most), self.low))
        else:
            value += self.step * action
        return min(max(value, self.low), self.high)

    def placed(self, action: float) -> float:
        """The value where an action puts the knob: -1 at the low end, 1 at the high end; what is beyond is clipped."""
        share = (min(max(action, -1.0), 1.0) + 1) / 2
        if self.logarithmic:
            value = float(from_doublings(share * doublings(self.high, self.low), self.low))
            return min(max(value, self.low), self.high)
        return self.low + share * (self.high - self.low)

    def mean(self, values: Sequence[float]) -> float:
        """The mean of some values, of a logarithmic knob in doublings; an `int` where the knob takes whole numbers."""
        mean = sum(values) / len(values)
        if self.logarithmic:
            places = [float(doublings(value, self.low)) for value in values]
            mean = float(from_doublings(sum(places) / len(places), self.low))
        return round(mean) if self.integer else round(mean, 4)


class ExportedPolicy:
    """A policy as a NumPy function from state to action.

    Args:
        knobs: what each entry of the action moves.
        state: what each entry of the state is; the knobs first, in their own units, then one entry a workload that is 1
            for the workload being tuned and 0 for the others, or, of a tuner, the rest of a `ContextLayout`.
        std_low, std_high: bounds of the standard deviation, in units of the action.
        weights: ``low``, ``high``, ``hidden.<n>.weight``, ``hidden.<n>.bias`` and the same for ``mean`` and ``std``.
    """

    def __init__(
        self,
        knobs: Sequence[KnobRange],
        state: Sequence[str],
        std_low: float,
        std_high: float,
        weights: Mapping[str, np.ndarray],
    ) -> None:
        self.knobs = tuple(knobs)
        self.state = tuple(state)
        self.std_low, self.std_high = std_low, std_high
        self.weights = dict(weights)
        self._layers = sum(name.startswith("hidden.") and name.endswith(".weight") for name in self.weights)
        self._check()

    @classmethod
    def of(cls, policy: KnobPolicy, knobs: Sequence[KnobRange], state: Sequence[str]) -> ExportedPolicy:
        """Take the policy network, the means' and the deviations' heads, and the bounds out of a trained policy.

        Raises:
            TypeError: the policy's networks are not those of `KnobPolicy`: tanh layers after a `BoundsScaler`.
        """
        scaler = policy.pi_features_extractor
        if not isinstance(scaler, BoundsScaler) or policy.activation_fn is not nn.Tanh:
            raise TypeError("only tanh networks after a BoundsScaler can be exported")
        layers = [layer for layer in policy.mlp_extractor.policy_net if isinstance(layer, nn.Linear)]
        named = {f"hidden.{number}": layer for number, layer in enumerate(layers)}
        assert isinstance(policy.action_net, nn.Linear)
        named |= {"mean": policy.action_net, "std": policy.spread_net}
        weights = as_arrays({"low": scaler.low, "high": scaler.high} | layer_tensors(named))
        return cls(knobs, state, policy.std_low, policy.std_high, weights)

    def __call__(self, state: Sequence[float] | np.ndarray) -> np.ndarray:
        """The deterministic action: the mean, in [-1, 1], for a state (or a batch of them along the first axis)."""
        return self.distribution(state)[0]

    def distribution(self, state: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the action, for a state or a batch of states.

        Raises:
            ValueError: the state has another number of entries, or one that is not finite.
        """
        values = np.asarray(state, dtype=np.float32)
        if values.shape[-1:] != (len(self.state),) or not np.isfinite(values).all():
            raise ValueError(f"a state has {len(self.state)} finite entries ({', '.join(self.state)}), got {state}")
        low, high = self.weights["low"], self.weights["high"]
        hidden = 2 * (values - low) / (high - low) - 1
        for layer in range(self._layers):
            hidden = np.tanh(self._linear(f"hidden.{layer}", hidden))
        mean = np.tanh(self._linear("mean", hidden))
        share = 1 / (1 + np.exp(-self._linear("std", hidden)))
        return mean, self.std_low * (self.std_high / self.std_low) ** share

    def state_of(self, values: Mapping[str, float], workload: str | None = None) -> np.ndarray:
        """The state for knob values by name while tuning a workload; an unknown or no workload has no entry set."""
        marks = {f"workload/{workload}": 1.0}
        return np.array([values[name] if name in values else marks.get(name, 0.0) for name in self.state], np.float32)

    def step(self, values: Mapping[str, float], workload: str | None = None) -> dict[str, float]:
        """The knobs after one step of tuning from `values`."""
        action = self(self.state_of(values, workload))
        return {
            knob.name: knob.moved(float(values[knob.name]), float(move))
            for knob, move in zip(self.knobs, action, strict=True)
        }

    def save(self, folder: Path, form: str = FORMAT, **further: str) -> None:
        """Write ``policy.safetensors`` and ``policy.json``, each of them whole or not at all.

        Args:
            folder: where they go.
            form: of the description, for what is more than a policy.
            further: entries of the description.
        """
        description = {
            "format": form,
            **further,
            "about": (__doc__ or "").strip(),
            "knobs": [asdict(knob) for knob in self.knobs],
            "state": list(self.state),
            "std_low": self.std_low,
            "std_high": self.std_high,
        }
        save_network(folder, self.weights, description)

    @classmethod
    def load(cls, folder: str | Path) -> ExportedPolicy:
        """Read what `save` wrote.

        Raises:
            RunFileError: a file is missing, damaged, or of another format.
        """
        return cls.restored(Path(folder), FORMAT, _UNSEALED)[0]

    @classmethod
    def restored(cls, folder: Path, form: str, earlier: str) -> tuple[ExportedPolicy, dict[str, Any]]:
        """The policy and the whole description that `save` wrote in a format, or without a checksum in an earlier one.

        Raises:
            RunFileError: as for `load`.
        """
        content = load_description(folder, form, earlier, "policy", _WAY_OUT)
        weights = load_weights(folder, _WAY_OUT)
        try:
            knobs = [KnobRange.restored(knob) for knob in content["knobs"]]
            state = decoded(tuple[str, ...], content["state"], "state")
            low, high = (decoded(Number, content[name], name) for name in ("std_low", "std_high"))
            return cls(knobs, state, low, high, weights), content
        except (KeyError, TypeError, ValueError) as error:
            raise RunFileError(f"the files of {folder} do not fit each other ({error!r}); {_WAY_OUT}") from error

    def _linear(self, name: str, values: np.ndarray) -> np.ndarray:
        return values @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _check(self) -> None:
        """One state through the networks shows whether every weight is there and fits."""
        shapes: dict[str, Any] = {name: array.shape for name, array in self.weights.items()}
        if not all(np.isfinite(array).all() for array in self.weights.values()):
            raise ValueError("a weight is NaN or infinite")
        if shapes["low"] != (len(self.state),) or shapes["high"] != (len(self.state),):
            raise ValueError(f"bounds of shapes {shapes['low']} and {shapes['high']} for {len(self.state)} entries")
        with np.errstate(all="ignore"):  # what overflows, or divides by a range of 0, shows in the result
            mean, std = self.distribution(self.weights["low"])
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and 0 < self.std_low <= self.std_high):
            raise ValueError("the bounds, or the weights, give no finite mean and deviation")
        if mean.shape != (len(self.knobs),) or std.shape != mean.shape:
            raise ValueError(f"{mean.shape} actions for {len(self.knobs)} knobs")


class ExportedKnobRule(KnobRule):
    """Learned policy that chooses a decoder's knobs before every round: `generate(..., knobs=rule)`.

    Args:
        policy: its state is the features of a text, as `specgym.decoding.round_features` lists them.
        action: `"move"` where its actions move the knobs, `"place"` where they place them in their ranges.

    Attributes:
        policy: as given.
        action: as given.

    Raises:
        ValueError: the policy sees other features, or there is no such kind of action.
    """

    def __init__(self, policy: ExportedPolicy, action: str) -> None:
        expected = [*(feature.name for feature in round_features(())), *(f"knobs/{knob.name}" for knob in policy.knobs)]
        if list(policy.state) != expected:
            raise ValueError(f"the policy sees {', '.join(policy.state)}, and a text has {', '.join(expected)}")
        if action not in ACTION_KINDS:
            raise ValueError(f"action must be one of {', '.join(ACTION_KINDS)}, got {action!r}")
        self.policy, self.action = policy, action

    @classmethod
    def of(cls, policy: KnobPolicy, knobs: Sequence[KnobRange], action: str) -> ExportedKnobRule:
        """Take the networks out of a trained policy. Errors as for `ExportedPolicy.of`."""
        names = [feature.name for feature in round_features(())] + [f"knobs/{knob.name}" for knob in knobs]
        return cls(ExportedPolicy.of(policy, knobs, names), action)

    def __call__(self, text: RoundTracker) -> dict[str, float]:
        """Choose, like any rule.

        Raises:
            KnobError: the decoder has other knobs than the rule was learned for.
        """
        knobs = self.policy.knobs
        if tuple(text.values) != tuple(knob.name for knob in knobs):
            raise KnobError(
                f"the rule was learned for the knobs {', '.join(knob.name for knob in knobs)}, and the decoder has "
                f"{', '.join(text.values) or 'none'}"
            )
        actions = np.clip(self.policy(text.features), -1.0, 1.0).tolist()
        if self.action == "place":
            return {knob.name: knob.placed(action) for knob, action in zip(knobs, actions, strict=True)}
        return {
            knob.name: knob.moved(min(max(text.values[knob.name], knob.low), knob.high), action)
            for knob, action in zip(knobs, actions, strict=True)
        }

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``, each of them whole or not at all."""
        self.policy.save(folder, RULE_FORMAT, action=self.action)

    @classmethod
    def load(cls, folder: str | Path) -> ExportedKnobRule:
        """Read what `save` wrote.

        Raises:
            RunFileError: a file is missing, damaged, of another format, or for other features.
        """
        policy, content = ExportedPolicy.restored(Path(folder), RULE_FORMAT, RULE_FORMAT)
        try:
            return cls(policy, content["action"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunFileError(
                f"{Path(folder) / DESCRIPTION_FILE} is of no such rule ({error!r}); {_WAY_OUT}"
            ) from error
