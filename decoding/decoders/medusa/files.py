"""Heads as files: safetensors for the weights, JSON for the rest, and a probe that tells one target from another.

Heads in the layout of Medusa's authors are read, too: a folder with ``config.json``, which has ``medusa_num_heads`` and
``medusa_num_layers``, and ``medusa_lm_head.pt`` or ``.safetensors``, whose tensors are called
``<head>.<block>.linear.weight``, ``<head>.<block>.linear.bias`` and, behind the blocks, ``<head>.<blocks>.weight`` for
the head's own output layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from ...files import replacing, write_text
from ...models.identity import alike, probe
from ...models.language_model import LanguageModel
from ...models.output_layer import output_layer
from ...sealed_files import FILES, check_files, file_digests, read_sealed, read_tensors, require_shapes, write_sealed
from .heads import HeadsShape, MedusaHeads, MedusaHeadsError

FORMAT = "specgym-medusa-2"
_UNSEALED = "specgym-medusa-1"  # has no checksums
DESCRIPTION = "medusa.json"
WEIGHTS = "medusa.safetensors"
_SHIPPED = Path(__file__).parents[2] / "data" / "models"
_TRAIN = "train heads for it: python -m specgym.decoding.fit medusa --target {} --out FOLDER"


def save_heads(
    heads: MedusaHeads,
    folder: str | Path,
    target: LanguageModel,
    *,
    card: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write heads, each file whole or not at all, the weights before what describes them.

    Args:
        heads: to be written; the target's output layer is not, where they share it.
        folder: where; created if need be.
        target: that they were trained for.
        card: text of the model card (README.md); none is written without.
        dtype: of the stored weights.
    """
    folder = Path(folder)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in heads.named_parameters()}
    tensors["probe"] = probe(target)
    if heads.shape.vocabulary:
        tensors["vocabulary"] = torch.tensor(heads.shape.vocabulary, dtype=torch.int32)
    shape = asdict(heads.shape)
    del shape["vocabulary"]
    described = {
        "format": FORMAT,
        "target": target.name,
        "shape": shape,
        "accuracies": [[round(share, 4) for share in row] for row in heads.accuracies],
    }
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_sealed(folder / DESCRIPTION, {**described, FILES: file_digests(folder, [WEIGHTS])})
    if card:
        write_text(folder / "README.md", card)


def load_heads(name: str | Path, target: LanguageModel, *, strict: bool = True) -> MedusaHeads:
    """Read heads, attach them to their target and put them into evaluation mode, in the precision of its output layer.

    Args:
        name: a folder that `save_heads` wrote or one of the public Medusa-1 layout (`public`), or the name of heads
            that the package ships.
        target: that they were made for.
        strict: refuse a target that is not the one they were made for. Without, they are tried on any of its shape: on
            one that was quantised to few bits, or trained further. That costs speed, and never changes exact decoding.

    Raises:
        MedusaHeadsError: they are not there, damaged, or made for another target.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (_SHIPPED / name / DESCRIPTION).is_file():
        folder = _SHIPPED / name
    if is_public(folder):
        heads = read_public(folder, target.model)
    elif (folder / DESCRIPTION).is_file():
        heads = _read(folder, target, strict)
    else:
        known = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{DESCRIPTION}"))) or "none"
        raise MedusaHeadsError(
            f"there are no Medusa heads in {folder}: it has no {DESCRIPTION} and no medusa_lm_head file. Give the "
            f"folder of heads, or the name of some that ship ({known}), or {_TRAIN.format(target.name)}"
        )
    if not all(bool(value.isfinite().all()) for value in heads.parameters()):
        raise MedusaHeadsError(f"{folder} holds NaN or infinite weights; {_TRAIN.format(target.name)}")
    heads.to(output_layer(target.model).weight.dtype)
    heads.attach(target.model)
    return heads.eval()


def heads_for(target: LanguageModel, heads: MedusaHeads | str | Path | None = None) -> MedusaHeads:
    """The heads that are meant: an object as it is, a folder or a name as for `load_heads`, or the usual ones.

    Raises:
        MedusaHeadsError: there are none, or they do not fit; the message says how to train some.
    """
    if isinstance(heads, MedusaHeads):
        return heads
    return usual_heads(target) if heads is None else load_heads(heads, target)


def usual_heads(target: LanguageModel) -> MedusaHeads:
    """The heads of a target where none are named: in ``<folder>-medusa`` beside its own folder, or that ship for it.

    Raises:
        MedusaHeadsError: there are none, or they do not fit.
    """
    name = f"{Path(target.name).name.lower()}-medusa"
    beside = Path(target.name).expanduser()
    beside = beside.with_name(f"{beside.name}-medusa")
    for folder in (beside, _SHIPPED / name):
        if (folder / DESCRIPTION).is_file() or is_public(folder):
            return load_heads(folder, target)
    raise MedusaHeadsError(
        f"no Medusa heads ship for {target.name}, and {beside} has none; {_TRAIN.format(target.name)}"
    )


def _read(folder: Path, target: LanguageModel, strict: bool) -> MedusaHeads:
    described = _description(folder / DESCRIPTION)
    path = folder / WEIGHTS
    try:
        check_files(folder, described, WEIGHTS)
        tensors = load_file(path)
        made_for = tensors.pop("probe")
        vocabulary = tensors.pop("vocabulary", torch.empty(0)).tolist()
        shape = HeadsShape(**described["shape"], vocabulary=tuple(map(int, vocabulary)))
        with torch.device("meta"):
            require_shapes(MedusaHeads(shape).state_dict(), tensors)
        heads = MedusaHeads(shape)
        heads.load_state_dict({key: value.float() for key, value in tensors.items()})
        heads.accuracies = tuple(tuple(map(float, row)) for row in described["accuracies"])
    except FileNotFoundError:
        raise MedusaHeadsError(f"{path} is missing; {_TRAIN.format(target.name)}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise MedusaHeadsError(
            f"{path} is damaged or does not fit {DESCRIPTION} ({' '.join(str(error).split())}); fetch both again, or "
            f"{_TRAIN.format(target.name)}"
        ) from error
    if strict and not alike(made_for, probe(target)):
        raise MedusaHeadsError(
            f"the heads in {folder} were made for the target {described['target']}, and {target.name} is another "
            f"model (or was trained further, quantised to few bits, or is damaged); {_TRAIN.format(target.name)}, or "
            "take them all the same with load_heads(..., strict=False)"
        )
    return heads


def _description(path: Path) -> Mapping[str, Any]:
    try:
        described = read_sealed(path, FORMAT)
        stored = described["format"]
        if stored in (FORMAT, _UNSEALED):
            _check(described)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise MedusaHeadsError(f"{path} is damaged ({error!r}); fetch it again") from error
    if stored not in (FORMAT, _UNSEALED):
        raise MedusaHeadsError(f"{path} has the format {stored!r}, and this version reads {FORMAT}")
    return described


def _check(described: Mapping[str, Any]) -> None:
    shape, rows = HeadsShape(**described["shape"]), described["accuracies"]
    if not isinstance(rows, list) or len(rows) not in (0, shape.heads):
        raise ValueError("accuracies must have a row a head")
    if any(not 0 <= share <= 1 for row in rows for share in row):
        raise ValueError("accuracies must be shares")
    if not isinstance(described["target"], str):
        raise TypeError("target must be a name")


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MedusaHeadsError(
            f"{folder / _CONFIG} is missing or damaged ({error!r}); fetch the whole folder that holds {path.name}"
        ) from error
    tensors = read_tensors(path, MedusaHeadsError)
    tokens, hidden = output_layer(model).weight.shape
    if count * (blocks + 1) > len(tensors):
        raise MedusaHeadsError(
            f"{path} lacks tensors: it has {len(tensors)}, and {_CONFIG} counts {count} heads of {blocks} blocks"
        )
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
