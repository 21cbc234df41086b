"""Reading heads in the layout that the authors of Medusa publish theirs in.

A folder with ``config.json``, which has ``medusa_num_heads`` and ``medusa_num_layers``, and ``medusa_lm_head.pt`` or
``.safetensors``, whose tensors are called ``<head>.<block>.linear.weight``, ``<head>.<block>.linear.bias`` and, behind
the blocks, ``<head>.<blocks>.weight`` for the head's own output layer.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ...models.output_head import output_layer
from .heads import HeadsShape, MedusaHeads, MedusaHeadsError

_CONFIG = "config.json"
_WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


def is_public(folder: Path) -> bool:
    """True if a folder has the public layout."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def read_public(folder: Path, model: PreTrainedModel) -> MedusaHeads:
    """Heads with output layers of their own, for a target of the same width and vocabulary.

    Nothing in such a folder tells one target from another of the same shape, but the name of the one that it was made
    for.

    Args:
        folder: of the public layout.
        model: the target.

    Raises:
        MedusaHeadsError: a file is missing or damaged, or the heads are for a target of another shape.
    """
    path = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        count, blocks = int(config["medusa_num_heads"]), int(config.get("medusa_num_layers", 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedusaHeadsError(
            f"{folder / _CONFIG} is missing or damaged ({error!r}); fetch the whole folder that holds {path.name}"
        ) from error
    tensors = _tensors(path)
    tokens, hidden = output_layer(model).weight.shape
    heads = MedusaHeads(HeadsShape(count, hidden, tokens, blocks, own_output=True))
    made_for = config.get("base_model_name_or_path", "another target")
    assert heads.output is not None
    with torch.no_grad():
        for head in range(count):
            for block in range(blocks):
                _put(heads.weight[block, head], tensors, f"{head}.{block}.linear.weight", path, made_for)
                _put(heads.bias[block, head], tensors, f"{head}.{block}.linear.bias", path, made_for)
            _put(heads.output[head], tensors, f"{head}.{blocks}.weight", path, made_for)
    return heads


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle that would run code is refused.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError("it holds something else than tensors by name")
        return tensors
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise MedusaHeadsError(f"{path} is damaged ({' '.join(str(error).split())}); fetch it again") from error


def _put(place: Tensor, tensors: dict[str, Tensor], name: str, path: Path, made_for: str) -> None:
    """Copy a tensor by its name, or by that with the prefix that some files have."""
    value = tensors.get(name, tensors.get(f"medusa_head.{name}"))
    if value is None:
        raise MedusaHeadsError(f"{path} lacks the tensor {name!r}; its {_CONFIG} does not fit it, or it is cut short")
    if value.shape != place.shape:
        raise MedusaHeadsError(
            f"{path}: {name!r} has shape {tuple(value.shape)}, but this target needs {tuple(place.shape)}; the heads "
            f"were made for {made_for}"
        )
    place.copy_(value)
