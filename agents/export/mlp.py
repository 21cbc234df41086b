"""Files of an exported network: weights as safetensors, everything else as JSON, no code in either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from specgym.decoding import replacing, write_json

from ..training.run_folder import DESCRIPTION_FILE, WEIGHTS_FILE, RunFileError, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    """Write ``policy.safetensors`` and ``policy.json``, each of them whole or not at all."""
    with replacing(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))
    write_json(folder / DESCRIPTION_FILE, dict(description))


def load_description(folder: Path, expected: str, kind: str, way_out: str) -> dict[str, Any]:
    """Read the description that `save_network` wrote.

    Args:
        folder: where it is.
        expected: its format.
        kind: what it should be, for messages.
        way_out: what to do where it is damaged, as the end of a sentence.

    Raises:
        RunFileError: the file is missing, damaged, or of another format.
    """
    content = read_json(folder / DESCRIPTION_FILE, way_out)
    if content.get("format") != expected:
        path = folder / DESCRIPTION_FILE
        raise RunFileError(f"{path} is not an exported {kind} of this version ({expected}); {way_out}")
    return content


def load_weights(folder: Path, way_out: str) -> dict[str, NDArray[Any]]:
    """Read the weights that `save_network` wrote. Raises RunFileError where they are missing or damaged."""
    path = folder / WEIGHTS_FILE
    try:
        weights: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunFileError(f"{path} is missing or damaged ({error}); {way_out}") from error
    return weights
