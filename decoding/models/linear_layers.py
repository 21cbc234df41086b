"""Linear layers of a model, prepacked for a CPU.

torch multiplies a short batch by a plain weight with a routine meant for large ones; the time then grows with every
token. With a packed weight it stays nearly flat up to a dozen tokens, which is what makes checking a draft cheaper than
generating its tokens one after another. There are two ways to pack:

* in float16 (`HalfWeight`), where every number of the weight survives that unchanged, which is so for what a checkpoint
  holds in float16, bfloat16 or eight bits and was loaded as float32. Inputs, products and sums stay float32, so that it
  is the same arithmetic on the same numbers, of which half the bytes are read;
* in oneDNN's blocked layout (`BlockedWeight`), for large layers that the target has in other numbers.

A model that somebody handed over keeps working as theirs. Its layers stay the objects that they are, hooks included;
whoever asks for a plain weight gets it, as the parameter that it was, and that layer is plain from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SMALLEST_PREPACKED = 2**19
"""Weights of fewer elements are not blocked: there the call into oneDNN costs more than the layout saves
(`benchmarks/forward_cost.py` measures both)."""

SMALLEST_HALVED = 2**15
"""Weights of fewer elements stay as they are in any case: on the shipped models of 192 and more it pays to keep
matrices of the hidden size in float16, on those of 128 it does not."""

NARROWEST_PREPACKED = 512
"""Hidden size below which nothing is blocked unless asked for: on the shipped models, 256 wide, a blocked output layer
made decoding 1 to 5 % slower."""

_LARGEST_POWER = 15  # the largest number of a row is brought to between 2 ** 14 and 2 ** 15, well inside float16
_TRIED_ROWS = 16
_ROWS_AT_ONCE = 64  # which stay in a core's cache while they are compared
_LOG = logging.getLogger("specgym")

_only_looking: ContextVar[bool] = ContextVar("_only_looking", default=False)


@contextlib.contextmanager
def only_looking() -> Iterator[None]:
    """Let names, shapes and types of weights be read without unpacking; numbers of packed ones are NaN meanwhile."""
    token = _only_looking.set(True)
    try:
        yield
    finally:
        _only_looking.reset(token)


class BlockedWeight:
    """A weight in oneDNN's layout, of its own type.

    Args:
        weight: shape (outputs, inputs), contiguous.
    """

    def __init__(self, weight: Tensor) -> None:
        # Packed for a batch of so many: the layout that oneDNN then chooses is read faster for one token, too.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self.dtype, self.nbytes = weight.dtype, weight.nbytes

    def dense(self) -> Tensor:
        """The weight as it was."""
        return self.packed.to_dense()

    def times(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what a linear layer does, shapes (..., inputs) to (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, bias, "none", [], "")


class HalfWeight:
    """A float32 weight all of whose numbers are float16 ones, or such times one number for every row.

    FBGEMM multiplies it with float32 inputs, in float32. Make it with `halved`.

    Args:
        halves: numbers of float16, shape (outputs, inputs), float32.
        scale: number for every row, shape (outputs,), float32; None for ones.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, halves: Tensor, scale: Tensor | None) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(halves, None)
        self._scale, self.nbytes = scale, halves.nbytes // 2 + (0 if scale is None else scale.nbytes)

    def __reduce__(self) -> tuple[object, ...]:
        return halved, (self.dense(),)

    def dense(self) -> Tensor:
        """The weight as it was, shape (outputs, inputs)."""
        weight = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return weight if self._scale is None else weight.mul_(self._scale[:, None])

    def times(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what a linear layer does, shapes (..., inputs) to (..., outputs)."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(inputs, self.packed)
        if self._scale is not None:
            product.mul_(self._scale)
        return product if bias is None else product.add_(bias)


def halved(weight: Tensor) -> HalfWeight | None:
    """Pack a weight in float16, if that keeps it to the last bit and this build of torch can multiply by it.

    Args:
        weight: shape (outputs, inputs).
    """
    usable = weight.dtype == torch.float32 and weight.device.type == "cpu"
    if not usable or torch.backends.quantized.engine not in ("x86", "fbgemm") or not halves_are_right():
        return None
    rows = _as_halves(weight[:_TRIED_ROWS]) and _as_halves(weight)
    return HalfWeight(*rows) if rows and weight.sum().isfinite() else None  # FBGEMM makes 65,504 of infinity


def _as_halves(weight: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Numbers of float16, and a number for every row, whose products are the weight; None where there are none."""
    if all(torch.equal(rows.half().float(), rows) for rows in weight.split(_ROWS_AT_ONCE)):
        return weight, None
    halves = weight.half().float()
    right = (halves == weight).all(1)
    largest = weight.abs().amax(1)
    scale = torch.ones_like(largest)
    power = torch.ldexp(scale, torch.frexp(largest).exponent - _LARGEST_POWER)  # bfloat16 has smaller and larger ones
    eighth = largest / 127  # symmetric eight bits, as `loading/checkpoint.py` unpacks them, up to rounding
    bounds = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for candidate in (power, eighth, *(torch.nextafter(eighth, bound) for bound in bounds)):
        trial = (weight / candidate[:, None]).half().float()
        fits = (trial * candidate[:, None] == weight).all(1) & ~right
        halves, scale = halves.where(~fits[:, None], trial), scale.where(~fits, candidate)
        right |= fits
        if right.all():
            return halves, scale
    return None


@lru_cache(maxsize=1)
def halves_are_right() -> bool:
    """True if products with float16 weights are those of float32, and if packing keeps every number of float16."""
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(72, 129, generator=generator, device="cpu").half().float()
    inputs = torch.randn(19, 129, generator=generator, device="cpu")
    expected = inputs.double() @ weight.double().t()
    try:
        packed = HalfWeight(weight, None)
        errors = [(packed.times(inputs[:count], None) - expected[:count]).abs().max() for count in (1, 5, 19)]
        kept = torch.equal(HalfWeight(_every_half(), None).dense().view(torch.int32), _every_half().view(torch.int32))
    except (RuntimeError, AttributeError) as error:
        _LOG.info("weights stay float32: this build of torch multiplies by no float16 ones (%s)", error)
        return False
    right = bool(max(errors) < 1e-4 * expected.std())  # float32 is off by 1e-6, and what adds in float16 by 1e-3
    if not (right and kept):
        _LOG.info("weights stay float32: float16 ones give products that are off by %.2g, or are altered", max(errors))
    return right and kept


def _every_half() -> Tensor:
    """All finite numbers of float16, shape (124, 512), float32."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.float16)
    return numbers[numbers.isfinite()].float().reshape(-1, 512)


class PrepackedLinear(nn.Module):
    """A linear layer (`nn.Linear`, or GPT-2's `Conv1D`) on CPU with its weight packed, for inference.

    It is the object that the model had, its class changed for the time being as `torch.nn.utils.parametrize` does. Its
    parameter stays, with its numbers in the packed weight alone. As soon as anything asks for it - to read, save, move,
    train, copy, pickle or merge - it gets them back and the layer is plain; so too if a pass needs gradients, another
    type or autocast. A weight that the embeddings use stays theirs, is held here a second time, and is watched.
    """

    plain: ClassVar[type[nn.Module]]
    """Class of the layer when it is not packed."""

    @property
    def packed(self) -> BlockedWeight | HalfWeight:
        """The weight as it is held."""
        return self.__dict__["_packed"]

    def dense(self) -> Tensor:
        """Rebuild the plain weight, shape (outputs, inputs), and stay packed."""
        return self.packed.dense()

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # type: ignore[override]
        if not _only_looking.get():
            _unpack_unasked(self)
        return self.__dict__["_parameters"]

    @property
    def weight(self) -> nn.Parameter | None:
        """The plain weight, for which the layer is unpacked."""
        return self._parameters["weight"]

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes (..., inputs) to (..., outputs)."""
        state = self.__dict__
        packed = state.get("_packed")  # None if a hook has asked for the weight since the call began
        if (
            packed is None
            or inputs.dtype != packed.dtype
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and _needs_gradients(inputs, *state["_parameters"].values()))
            # Decoders look for changes at the start of a text; the passes of others are looked at in full.
            or (state["_shared"] is not None and _changed(self, in_full=not torch.is_inference_mode_enabled()))
        ):
            _unpack_unasked(self)
            return type(self).forward(self, inputs)
        return packed.times(inputs, state["_parameters"]["bias"])

    def train(self, mode: bool = True) -> nn.Module:  # type: ignore[override]
        """Set the mode; training needs the plain weight."""
        if mode:
            _unpack_unasked(self)
        return nn.Module.train(self, mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        sample = torch.empty(0, dtype=self.__dict__["_packed"].dtype, device="cpu")
        if fn(sample) is sample and not sample.is_shared():  # it is already where it is to go
            return self
        _unpack_unasked(self)
        return self._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _unpack_unasked(self)
        return self.__reduce_ex__(protocol)


class _PrepackedLinear(PrepackedLinear, nn.Linear):  # type: ignore[misc]
    plain = nn.Linear


class _PrepackedConv1D(PrepackedLinear, Conv1D):  # type: ignore[misc]
    plain = Conv1D


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _version(weight: Tensor) -> tuple[int, int]:
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def _changed(layer: PrepackedLinear, in_full: bool) -> bool:
    """True if a weight that others use too is no longer what was packed.

    Writes through `.data` have no version; but hardly any leaves the first column as it is.
    """
    if layer.__dict__["_shared"] is None:
        return False
    version, column = layer.__dict__["_shared"]
    weight = layer.__dict__["_parameters"]["weight"]
    return version != _version(weight) or (in_full and not torch.equal(weight.detach()[:, 0], column))


def _unpack_unasked(layer: nn.Module) -> None:
    if isinstance(layer, PrepackedLinear):
        _unpack(layer)
        warnings.warn(
            "the plain weight of a packed layer was asked for, so that layer is plain again, and passes over several "
            "tokens take longer. Pair.unpack() does this for a whole model, Pair.pack() packs what is plain.",
            stacklevel=1,
        )


@torch.inference_mode(False)
@torch.no_grad()
def _unpack(layer: PrepackedLinear) -> None:
    weight = layer.__dict__["_parameters"]["weight"]
    if layer.__dict__["_shared"] is None:
        dense = layer.dense()
        weight.data = dense.t().contiguous() if isinstance(layer, Conv1D) else dense
    del layer.__dict__["_packed"], layer.__dict__["_shared"]
    layer.__class__ = layer.plain  # type: ignore[assignment]


@torch.inference_mode(False)
@torch.no_grad()
def _pack(layer: nn.Module, shared: bool, smallest: int | None) -> bool:
    """Pack one layer, if that can be; unless its weight is shared, free it."""
    weight = layer.__dict__["_parameters"]["weight"]
    transposed = isinstance(layer, Conv1D)  # as GPT-2 keeps its weights
    rows = (weight.detach().t() if transposed else weight.detach()).contiguous()
    packed = halved(rows) or (None if smallest is None or rows.numel() < smallest else BlockedWeight(rows))
    if packed is None:
        return False
    layer.__dict__["_packed"] = packed
    layer.__dict__["_shared"] = (_version(weight), weight.detach()[:, 0].clone()) if shared else None
    if not shared:
        if not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # a backward pass that still needs it fails, saying so
        weight.data = torch.full((), torch.nan, dtype=weight.dtype, device="cpu").expand(weight.shape)
        _give_back()
    layer.__class__ = _PrepackedConv1D if transposed else _PrepackedLinear
    return True


def _give_back() -> None:
    """Return freed memory to the system where the C library would keep it, and a model would take its size twice.

    glibc keeps blocks of up to 32 MB (M_MMAP_THRESHOLD in mallopt(3)). A freed weight then leaves a hole that the next
    packed one, which is aligned, does not fit into.
    """
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries, and Windows
        ctypes.CDLL(None).malloc_trim(0)


def can_prepack(model: nn.Module) -> bool:
    """True if this build and this model's device and type allow prepacking."""
    with only_looking():
        weight = next(model.parameters(), None)
    return weight is not None and _can_prepack(weight)


def _can_prepack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bfloat16)


def _is_packable(layer: nn.Module, smallest: int) -> bool:
    """True for a large linear layer that computes what its class does, with weights of its own.

    A subclass may compute something else, and so do layers that are quantised, parametrized or pruned, or whose
    `forward` was replaced, as accelerate does to move weights around.
    """
    names = layer.__dict__["_parameters"].keys()
    if type(layer) not in (nn.Linear, Conv1D) or "forward" in layer.__dict__ or names != {"weight", "bias"}:
        return False
    weight, bias = layer.__dict__["_parameters"].values()
    return (
        type(weight) is nn.Parameter
        and weight.numel() >= smallest
        and _can_prepack(weight)
        and (bias is None or (bias.dtype, bias.device) == (weight.dtype, weight.device))
    )


def prepack_linears(model: nn.Module, smallest: int | None = SMALLEST_PREPACKED) -> int:
    """Pack linear layers in place, in float16 where they keep every number so; returns how many were packed.

    Each plain weight is freed before the next one is packed, so that memory does not double. What anything outside the
    model holds, such as an optimiser or another model, is left alone.

    Args:
        model: on a CPU.
        smallest: elements of the smallest weights that are blocked if they cannot be in float16; None for none.
    """
    least = SMALLEST_HALVED if smallest is None else min(smallest, SMALLEST_HALVED)
    layers = [layer for layer in model.modules() if _is_packable(layer, least)]
    uses = Counter(id(weight) for layer in model.modules() for weight in layer.__dict__["_parameters"].values())
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None

    def held(layer: nn.Module) -> bool:  # by more than the modules that use it, and this call
        parameters = layer.__dict__["_parameters"]
        return sys.getrefcount(parameters["weight"]) > uses[id(parameters["weight"])] + sys.getrefcount(object())

    shared = {layer: uses[id(layer.__dict__["_parameters"]["weight"])] > 1 for layer in layers}
    if any(held(layer) for layer in layers if not shared[layer]):
        gc.collect()  # the holder may be gone already
    packed = 0
    for layer in layers:
        if layer is output if shared[layer] else not held(layer):
            packed += _pack(layer, shared[layer], smallest)
    return packed


def unpack_linears(model: nn.Module) -> None:
    """Make packed layers plain again, one by one."""
    for layer in model.modules():
        if isinstance(layer, PrepackedLinear):
            _unpack(layer)


def unpack_changed_output(model: PreTrainedModel) -> None:
    """Make the output layer plain if embeddings use its weight, too, and have changed it."""
    layer = model.get_output_embeddings()
    if isinstance(layer, PrepackedLinear) and _changed(layer, in_full=True):
        _unpack(layer)
