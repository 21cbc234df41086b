"""Checkpoint folders that may share tensors with another checkpoint: a draft need not store its target's embeddings.

Such a folder holds what transformers expects (``config.json``, ``generation_config.json``, ``model.safetensors``), a
model card, and ``specgym.json`` (`specgym.decoding.loading.link`), which says where the tokeniser is, which tensors
live in which other folder, and what the SHA-256 of every file is. A draft that proposes some tokens only
(`reduced_output`) has their ids among its tensors. Matrices may be stored in 8 bits, which transformers itself does not
read: whole numbers, symmetric around zero, with a scale for each row, which is its largest magnitude over 127, so that
no weight moves by more than half a scale ("absmax" of Dettmers et al., arXiv 2208.07339, by rows). Nothing is computed
in 8 bits: loading turns the matrices back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..files import replacing, write_json, write_text
from ..models.output_layer import reduce_output, tokens_name
from ..models.supported import auto_class
from ..sealed_files import read_json
from .link import (
    CONFIG,
    GENERATION,
    LINK,
    WAY_OUT,
    WEIGHTS,
    CheckpointError,
    Link,
    check_digests,
    is_checkpoint,
    read_link,
    write_link,
)

_MOST_HEADS = 4096
_SPARE_ELEMENTS = 2**24
_MOST_SHARED = 2**32
_LARGEST_RATIO = 64
"""Elements of a model for each that is stored, at most, beyond `_SPARE_ELEMENTS` and what another folder stores.

A draft of a few tokens stores few rows of its output layer, and a mask of a whole context is not stored.
"""
_LARGEST = 127
_SCALE = "_scale"


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path | str,
    *,
    card: str,
    tokenizer: str | None = None,
    shared_with: str | None = None,
    shared: Mapping[str, str] | Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
    eight_bits: bool = False,
) -> None:
    """Write a checkpoint folder; every file takes its place in one step, the weights before what points at them.

    Args:
        model: the model.
        folder: where; created if need be.
        card: text of the model card (README.md).
        tokenizer: folder of the tokeniser, relative to ``folder``, or hub id of a model that has it; None if it lies in
            ``folder`` itself.
        shared_with: folder (relative to ``folder``) or hub id of the checkpoint that holds the shared tensors.
        shared: names of the tensors to leave out; a mapping where they are called otherwise there.
        dtype: of the stored floating-point tensors.
        eight_bits: store matrices in 8 bits instead; only specgym reads such a folder.

    Raises:
        ValueError: if a shared name is no tensor of the model, only one of ``shared_with`` and ``shared`` is given, or
            what is to be stored in 8 bits is not finite.
    """
    folder = Path(folder)
    names = dict(shared) if isinstance(shared, Mapping) else {name: name for name in shared}
    if (shared_with is None) != (not names):
        raise ValueError("give both or neither of shared_with and shared")
    tensors, state = dict[str, torch.Tensor](), dict(model.state_dict(keep_vars=True))
    if unknown := sorted(set(names) - set(state)):
        raise ValueError(f"not in the model: {', '.join(unknown)}; its tensors are {', '.join(sorted(state))}")
    # Tied tensors are one parameter under several names: store the first, and none if one of them is shared.
    seen = {id(state[name]) for name in names}
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().to("cpu").contiguous()
    # Scales are float32, and what they scale is made of the weights as they are, not as `dtype` would round them.
    packed = pack(tensors) if eight_bits else tensors
    for name in set(packed) & set(tensors):
        if packed[name].is_floating_point():
            packed[name] = packed[name].to(dtype)
    config = model.config.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    generation = GenerationConfig.from_model_config(model.config).to_diff_dict()
    with replacing(folder / WEIGHTS) as temporary:
        # Made in memory and written by us: save_file maps the file, which cannot then be replaced on every system.
        temporary.write_bytes(save(packed, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    write_json(folder / GENERATION, generation)
    write_link(folder, Link(tokenizer, shared_with, names or None))
    write_text(folder / "README.md", card)


def load_checkpoint(
    folder: Path | str, dtype: torch.dtype = torch.float32, shared_from: nn.Module | None = None
) -> PreTrainedModel:
    """Read a checkpoint folder into a model, in eval mode, on the CPU.

    Args:
        folder: written by :func:`save_checkpoint`.
        dtype: of the model's floating-point tensors.
        shared_from: the model that holds the shared tensors, already in memory. The result then uses the very same
            parameters (its dtype and device must suit), so they cost no memory twice. None reads them from disk.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    link = read_link(folder)
    has_generation = (folder / GENERATION).is_file()
    check_digests(folder, link, [CONFIG, *([GENERATION] if has_generation else [])])
    tensors = _read(folder, link, dtype)
    model = _built(folder, tensors, set(link.shared or ()), dtype)
    _reduce(model, tensors, folder)
    shared = dict(link.shared or {})
    if foreign := sorted((set(tensors) | set(shared)) - set(model.state_dict())):
        raise CheckpointError(f"{folder / WEIGHTS} and config.json do not fit: no place for {foreign[0]!r}: {WAY_OUT}")
    if shared:
        tensors |= _shared(folder, link, shared, dtype, shared_from)
    _put(model, tensors, folder)
    _fill_buffers(model)
    if has_generation:
        try:
            read_json(folder / GENERATION)
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{folder / GENERATION} cannot be used ({_line(error)}): {WAY_OUT}") from error
    model.name_or_path = str(folder)
    return model.eval()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _built(folder: Path, tensors: Mapping[str, Tensor], shared: set[str], dtype: torch.dtype) -> PreTrainedModel:
    """A model by the configuration of a folder, on the meta device, if it is not far larger than what is stored.

    Args:
        folder: with ``config.json``.
        tensors: that are stored.
        shared: names of those that another folder stores.
        dtype: of the model.

    Raises:
        CheckpointError: the configuration cannot be used.
    """
    path = folder / CONFIG
    # What transformers raises for a value that it does not expect is of every kind, from its own checks
    # (StrictDataclassClassValidationError of huggingface_hub 1.x) to what torch says of a negative size.
    try:
        check_counts(read_json(path), len(tensors) + len(shared))
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
        sizes = {name: part.numel() for name, part in (*model.named_parameters(), *model.named_buffers())}
        elements = sum(size for name, size in sizes.items() if name not in shared)
        most = _SPARE_ELEMENTS + _LARGEST_RATIO * sum(tensor.numel() for tensor in tensors.values())
        if elements > most or sum(sizes.values()) > elements + _MOST_SHARED:
            raise CheckpointError(f"it describes {elements} numbers, far more than {WEIGHTS} holds")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used ({_line(error)}): {WAY_OUT}") from error
    return model


def check_counts(config: object, tensors: int) -> None:
    """Raise CheckpointError where a configuration counts more layers than there are tensors, or asks for loops as long.

    Some libraries go through what is counted before they look at anything else: a number of layers or of labels beyond
    all reason would never come to an end.
    """
    for name, value in _numbers(config):
        layers = ("layer" in name and "hidden" in name) or name in ("n_layer", "n_layers", "num_layers")
        most = tensors if layers else _MOST_HEADS if name.startswith("num_") else 2**40
        if abs(value) > most:
            raise CheckpointError(f"{name} is {value}, which does not fit {tensors} tensors")


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested JSON with the names that they have; those of a list have the list's."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(entry, key)
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _read(
    folder: Path, link: Link, dtype: torch.dtype, names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a folder, or some of them by name, those of floating point in a type; one at a time is unpacked.

    The file is mapped anew for each, because all pages that were read count as this process's while it is mapped.
    """
    path = folder / WEIGHTS
    check_digests(folder, link, [WEIGHTS])
    tensors = dict[str, Tensor]()
    try:
        with safe_open(path, framework="pt") as file:
            stored = list(file.keys())
        scales = {name + _SCALE for name in stored}.intersection(stored)
        for name in stored:
            if name in scales or (names is not None and name not in names):
                continue
            with safe_open(path, framework="pt") as file:
                parts = {part: file.get_tensor(part) for part in (name, *scales.intersection([name + _SCALE]))}
            value = unpack(parts)[name]
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
        return tensors
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {WAY_OUT}") from None
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a type that torch lacks
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}): {WAY_OUT}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}: {WAY_OUT}") from error


def _reduce(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Let the model score only the tokens that the file lists, if it lists any."""
    name = tokens_name(model)
    if name is not None and name in tensors:
        try:
            reduce_output(model, tensors[name])
        except ValueError as error:
            raise CheckpointError(f"{folder / WEIGHTS}: {name!r} cannot be used ({error}): {WAY_OUT}") from error


def _shared(
    folder: Path, link: Link, shared: Mapping[str, str], dtype: torch.dtype, source: nn.Module | None
) -> dict[str, torch.Tensor]:
    """The shared tensors by their names here: parameters of ``source`` itself, or read from the folder or hub id."""
    assert link.shared_with is not None
    if source is None:
        place = (folder / link.shared_with).resolve()
        origin = str(place) if place.is_dir() else link.shared_with
        if is_checkpoint(place):
            held: Mapping[str, torch.Tensor] = _read(place, read_link(place), dtype, set(shared.values()))
        else:
            try:
                config = AutoConfig.from_pretrained(origin, trust_remote_code=False)
                held = auto_class(config).from_pretrained(origin, dtype=dtype).state_dict()
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{folder / LINK} shares tensors with {origin!r}, which cannot be loaded ({error}): put that model "
                    "there, or pass the target that this draft was distilled from"
                ) from error
    else:
        held, origin = _held_by(source, shared.values()), "the model given to share from"
    if missing := sorted(set(shared.values()) - set(held)):
        raise CheckpointError(f"{origin} has no tensor {missing[0]!r}, which {folder / LINK} shares: {WAY_OUT}")
    copies = {name: held[there] for name, there in shared.items()}
    return copies if source is not None else {name: tensor.to(dtype) for name, tensor in copies.items()}


def _held_by(source: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of the tensors that a model has, by name; its `state_dict` would make all prepacked weights anew."""
    held = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            held[name] = getattr(source.get_submodule(owner), attribute)
    return held


def _put(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Make ``tensors`` the parameters and buffers of ``model``; a Parameter among them is used as it is."""
    expected = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        stored = [name for name in names if name in tensors]
        if not stored:
            raise CheckpointError(f"{folder / WEIGHTS} lacks the tensor {names[0]!r}: {WAY_OUT}")
        values = {name: _fitting(tensors[name], expected[name], name, folder) for name in stored}
        first = values[stored[0]]
        for name in names:
            # A T5 may have another output layer than its configuration says, by which it is its embedding.
            value = values.get(name, first)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, first if torch.equal(value, first) else value)


def _fitting(value: Tensor, old: Tensor, name: str, folder: Path) -> Tensor:
    """A tensor that may take the place of another, a parameter if that is one."""
    if value.is_floating_point() != old.is_floating_point() or value.is_complex():
        raise CheckpointError(f"{folder / WEIGHTS}: {name!r} has the type {value.dtype}: {WAY_OUT}")
    if value.shape != old.shape:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {name!r} has shape {tuple(value.shape)}, "
            f"but the model needs {tuple(old.shape)} "
            f"(does it share tensors with another model than it was made for?): {WAY_OUT}"
        )
    return nn.Parameter(value) if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter) else value


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds, such as frequencies of a rotation, which are still on the meta device.

    As `from_pretrained` does: only what is not marked gets values (transformers 5.23, `_initialize_missing_keys`).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with their matrices in 8 bits, each followed by its scales; all else is as it was.

    Args:
        tensors: by name; those of two dimensions and floating point are packed.

    Returns:
        For a matrix ``x`` of shape (n, m): ``x``, int8, shape (n, m), and ``x_scale``, float32, shape (n,).

    Raises:
        ValueError: a matrix holds numbers that are not finite; the message names it.
    """
    packed = dict[str, Tensor]()
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            packed[name] = tensor
            continue
        rows = tensor.detach().to(torch.float32)
        if not rows.isfinite().all():
            raise ValueError(f"the tensor {name!r} holds numbers that are not finite, which 8 bits cannot")
        scale = rows.abs().amax(1) / _LARGEST
        # A row of zeros stays one, whatever it is divided by.
        numbers = (rows / scale.where(scale > 0, 1.0)[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        packed |= {name: numbers.to(torch.int8), name + _SCALE: scale}
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `pack`: matrices in float32, rounded to what their scales allow.

    Args:
        tensors: by name; every one of int8 has its scales beside it, and nothing else has any.

    Raises:
        ValueError: the scales of a matrix are missing, of a wrong shape or type, not finite or negative, or 8 bits or
            scales stand where they do not belong; the message names the tensor.
    """
    unpacked = dict[str, Tensor]()
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors):
                unpacked[name] = tensor
            elif tensors[name.removesuffix(_SCALE)].dtype != torch.int8:
                raise ValueError(f"{name!r} belongs to a tensor that is not in 8 bits")
            continue
        scale = tensors.get(name + _SCALE)
        if tensor.ndim != 2:
            raise ValueError(f"{name!r} is in 8 bits and no matrix, but of shape {tuple(tensor.shape)}")
        if scale is None:
            raise ValueError(f"{name!r} is in 8 bits, and its scales {name + _SCALE!r} are missing")
        if not scale.is_floating_point() or scale.shape != tensor.shape[:1]:
            kind = str(scale.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name + _SCALE!r} is {kind} of shape {tuple(scale.shape)}, not a row of {len(tensor)} scales"
            )
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ValueError(f"{name + _SCALE!r} holds a scale that is negative or not finite")
        unpacked[name] = tensor.to(torch.float32) * scale.to(torch.float32)[:, None]
    return unpacked
