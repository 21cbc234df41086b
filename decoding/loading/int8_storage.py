"""Matrices in 8 bits on disk: whole numbers with a scale for each row, a quarter of float32 and half of float16.

The numbers are symmetric around zero, so that a row's scale is its largest magnitude over 127 and no weight moves by
more than half a scale ("absmax" of Dettmers et al., arXiv 2208.07339, by rows). Nothing is computed in 8 bits: loading
turns the matrices back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 127
_SCALE = "_scale"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with their matrices in 8 bits, each followed by its scales; all else is as it was.

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
    """What `pack` was given, its matrices in float32 and rounded to what their scales allow.

    Args:
        tensors: by name; every one of int8 has its scales beside it, and nothing else has any.

    Raises:
        ValueError: the scales of a matrix are missing, of a wrong shape or type, not finite or negative, or 8 bits or
            scales stand where they do not belong; the message names the tensor.
    """
    found = dict[str, Tensor]()
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors):
                found[name] = tensor
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
        found[name] = tensor.to(torch.float32) * scale.to(torch.float32)[:, None]
    return found
