"""Identity of models: hashes of their weights, and probes that survive rounding.

A probe is the hidden states that a model has along a few fixed tokens. In another precision a model still has nearly
the same ones; another model, even of the same shape, does not, nor does one that was trained further.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .language_model import LanguageModel
from .linear_layers import PrepackedLinear, only_looking

SAME = 0.997
"""Mean cosine of two probes above which they are of one model: rounded to bfloat16 or to eight bits it stays above
that, and a few steps of further training take it below (both are tested)."""
_TOKENS = 16
_SIDE = 8


def probe(model: LanguageModel) -> Tensor:
    """The hidden states that a model has along some fixed tokens, shape (16, h), float32, on the CPU."""
    tokens = (7 * torch.arange(1, _TOKENS + 1, device=model.device)) % model.vocabulary_size
    hidden = model.fresh().forward(tokens, hidden=True).hidden
    assert hidden is not None
    return hidden.float().cpu()


def alike(first: Tensor, other: Tensor) -> bool:
    """True if two probes are of the same model; False where they differ in shape or hold NaN."""
    return first.shape == other.shape and bool(functional.cosine_similarity(first, other, dim=-1).mean() >= SAME)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights, as float32, whatever device they are on; 64 hex digits."""
    state = hashlib.sha256()
    for name, tensor in weights_one_by_one(model):
        state.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32) if tensor.is_floating_point() else tensor.detach().cpu()
        state.update(values.contiguous().numpy().tobytes())
    return state.hexdigest()


@torch.inference_mode()
def sampled_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and types of all weights, and 64 values of each, evenly spread; 64 hex digits.

    Reads few values where `weights_digest` reads gigabytes; of packed layers by a pass over 8 tokens. It tells other
    checkpoints, further training, another type or quantisation, and missing or renamed weights; not a change to a few
    single values that were not looked at.
    """
    with only_looking():
        state = model.state_dict()
    packed = _packed_layers(model)
    digest = hashlib.sha256()
    for name in sorted(state):
        layer = packed.get(name)
        for tensor in tensors_in(state[name]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            values = _sampled(tensor) if layer is None else _sampled_packed(layer, tensor.shape)
            values = values + 0 if values.is_floating_point() else values  # which has one zero alone
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> Tensor:
    """Values at 64 places at most; of a matrix at the crossings of eight rows and eight columns."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    if tensor.dim() != 2:
        return tensor.reshape(-1)[_places(tensor.numel(), _SIDE**2, tensor.device)]
    rows, columns = (_places(size, _SIDE, tensor.device) for size in tensor.shape)
    return tensor[rows][:, columns]


def _sampled_packed(layer: PrepackedLinear, shape: torch.Size) -> Tensor:
    """Such values of a packed layer that stays packed: its outputs for inputs of a single 1."""
    rows, columns = (_places(size, _SIDE) for size in shape)
    inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
    ones = functional.one_hot(inputs, shape[0 if isinstance(layer, Conv1D) else 1]).to(layer.packed.dtype)
    crossings = layer.packed.times(ones, None)[:, outputs]
    return crossings if isinstance(layer, Conv1D) else crossings.t()


def _places(size: int, most: int, device: torch.device | None = None) -> Tensor:
    """Evenly spread numbers below a size, at most so many."""
    return torch.linspace(0, max(size - 1, 0), min(size, most), dtype=torch.float64).long().to(device)


def _packed_layers(model: nn.Module) -> dict[str, PrepackedLinear]:
    """Packed layers by the name of their weight."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight": layer for name, layer in modules if isinstance(layer, PrepackedLinear)}


def weights_one_by_one(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of `state_dict`, ordered by name; at most one packed or quantised weight is rebuilt."""
    with only_looking():
        state = model.state_dict()
    packed = _packed_layers(model)
    for name in sorted(state):
        layer = packed.get(name)
        if layer is not None:
            yield name, layer.dense().t() if isinstance(layer, Conv1D) else layer.dense()
        for tensor in tensors_in(state[name]) if layer is None else ():
            yield name, tensor.dequantize() if tensor.is_quantized else tensor


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors of an entry of `state_dict`; a layer that torch quantised has a tuple of weight and bias there."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
