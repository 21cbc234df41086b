"""Files of a learned rule: weights in safetensors, described in JSON, and refused by name where they are damaged."""

from __future__ import annotations

import inspect
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import Feature

from ..training.run_folder import DESCRIPTION_FILE, WEIGHTS_FILE, RunFileError
from .knob_policy import load_description, load_weights, save_network

_WAY_OUT = "remove its folder, and python train.py --resume <run> learns it again"

Array = NDArray[np.float32]


class ExportedRule:
    """Learned rule in two files.

    Args:
        weights: by name.

    Attributes:
        FORMAT: of the description.
        UNSEALED: format of a description without a checksum, where there were such.
        KIND: of the rule, in words.
        FEATURES: columns that it decides by. They are only ever added at the end, so an earlier rule knows the first
            of them.
        weights: as float32.

    Raises:
        ValueError: a weight is missing, does not fit, or is not finite.
    """

    FORMAT: ClassVar[str]
    UNSEALED: ClassVar[str] = ""
    KIND: ClassVar[str]
    FEATURES: ClassVar[Sequence[Feature]]

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.weights = {name: np.asarray(array, dtype=np.float32) for name, array in weights.items()}

    @property
    def name(self) -> str:
        """`learned`."""
        return "learned"

    @property
    @abstractmethod
    def hidden(self) -> list[int]:
        """Widths of the hidden layers."""

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``, each of them whole or not at all."""
        description = {
            "format": self.FORMAT,
            "about": (inspect.getmodule(type(self)).__doc__ or "").strip(),
            "features": [asdict(feature) for feature in self.FEATURES[: len(self.weights["middle"])]],
            "hidden": self.hidden,
        }
        save_network(folder, self.weights, description)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RunFileError: a file is missing, damaged, of another format, or for other features.
        """
        described, weights_path = Path(folder) / DESCRIPTION_FILE, Path(folder) / WEIGHTS_FILE
        content = load_description(Path(folder), cls.FORMAT, cls.UNSEALED or cls.FORMAT, cls.KIND, _WAY_OUT)
        try:
            known = [(feature["name"], feature["low"], feature["high"]) for feature in content["features"]]
        except (KeyError, TypeError) as error:
            raise RunFileError(f"{described} is damaged ({error!r}); {_WAY_OUT}") from error
        if known != [(feature.name, feature.low, feature.high) for feature in cls.FEATURES][: len(known)]:
            raise RunFileError(f"{described} is for other features than this version's; {_WAY_OUT}")
        try:
            rule = cls(load_weights(Path(folder), _WAY_OUT))
        except RunFileError:
            raise
        except ValueError as error:
            raise RunFileError(f"{weights_path} holds no {cls.KIND} ({error}); {_WAY_OUT}") from error
        if content.get("hidden") != rule.hidden:
            raise RunFileError(f"{described} does not fit {weights_path}; {_WAY_OUT}")
        return rule


def require_weights(weights: Mapping[str, Array], expected: set[str]) -> None:
    """Raise ValueError unless there are these weights, all of them finite."""
    if set(weights) != expected:
        raise ValueError(f"weights that do not match: {', '.join(sorted(set(weights) ^ expected))}")
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise ValueError("a weight is NaN or infinite")


def hidden_layers(weights: Mapping[str, Array]) -> list[str]:
    """Names of the hidden layers that there are weights of, in order."""
    count = sum(name.startswith("hidden.") and name.endswith(".weight") for name in weights)
    return [f"hidden.{number}" for number in range(count)]


def layer_of(
    weights: Mapping[str, Array], name: str, inputs: int, outputs: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Weight, bias and number of outputs of a layer.

    Args:
        weights: of the rule.
        name: of the layer.
        inputs: entries of what goes in.
        outputs: entries of what comes out; by default as many as there are biases.

    Raises:
        ValueError: the shapes are others.
    """
    weight, bias = (weights[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    outputs = len(bias) if outputs is None else outputs
    if bias.shape != (outputs,) or weight.shape != (outputs, inputs):
        raise ValueError(f"{name} has shapes {weight.shape} and {bias.shape} for {inputs} inputs")
    return weight, bias, operator.index(outputs)


def scaling(weights: Mapping[str, Array], most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middle and spread of the features that a rule knows.

    Args:
        weights: of the rule.
        most: features that there are.

    Raises:
        ValueError: they have other shapes, or a spread is not above 0.
    """
    middle, spread = weights["middle"].astype(np.float64), weights["spread"].astype(np.float64)
    if not (middle.ndim == 1 and middle.shape == spread.shape and 0 < len(middle) <= most and (spread > 0).all()):
        raise ValueError(f"the scaling must be positive and of shape ({most},), or shorter in earlier files")
    return middle, spread
