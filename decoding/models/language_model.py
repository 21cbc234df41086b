"""One Hugging Face causal LM with a key/value cache that can branch and be cut back.

Identity of models: hashes of their weights, and probes that survive rounding.

A probe is the hidden states that a model has along a few fixed tokens. In another precision a model still has nearly
the same ones; another model, even of the same shape, does not, nor does one that was trained further.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import NumericalError, PromptError, UnsupportedModelError
from .kv_cache import BranchingCache, TokenTree
from .linear_layers import (
    NARROWEST_PREPACKED,
    can_prepack,
    output_module,
    prepack_linears,
    unpack_linears,
    weights_one_by_one,
)
from .supported import causal_model, execution_device, refuse_unsupported, require_ready

_STRIP_ROWS = 64
_PART = 512


class Logits(NamedTuple):
    """Result of a forward pass, a row a token."""

    scores: Tensor
    """Next-token logits, shape (tokens, vocabulary), float32."""
    hidden: Tensor | None
    """Last hidden states of the tokens after the final norm, from which the output layer makes scores, shape
    (tokens, hidden size); None if not asked for."""


class LanguageModel:
    """A causal language model that reads tokens one span at a time, and can take any of them back.

    Batch size 1. Tree attention goes through the public 4-D attention mask and position ids, so no architecture is
    patched; one that gives other results that way is refused here, by a small trial.

    Attributes:
        mask_seconds: how long building the mask of the last pass took.

    Args:
        model: any transformers causal LM. It is put into evaluation mode.
        prepack: reorder the linear layers' weights for oneDNN, *in place* (see `prepack`); by default on
            CPU, for models at least 512 wide. With False the model is left untouched.

    Raises:
        UnsupportedModelError: the architecture cannot be decoded speculatively.
        NumericalError: the model's weights give NaN.
    """

    def __init__(self, model: PreTrainedModel, *, prepack: bool | None = None) -> None:
        refuse_unsupported(causal_model(model))
        self.model = model.eval()
        config = model.config.get_text_config(decoder=True)
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        self.vocabulary_size = int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.context_limit = _context_limit(config)
        self.device = execution_device(model)
        self.dtype = model.dtype
        self._mask_value = torch.finfo(model.dtype).min
        if prepack and not can_prepack(model):
            raise ValueError(
                f"{self.name} ({self.dtype} on {self.device}) cannot be prepacked: that needs float32 (or bfloat16, "
                "where oneDNN supports it) on CPU. Leave `prepack` unset."
            )
        wide = self.hidden_size >= NARROWEST_PREPACKED
        if prepack or (prepack is None and wide and can_prepack(model)):
            prepack_linears(model)
        self._cache = BranchingCache()
        self._last_start = 0
        self.mask_seconds = 0.0
        _try_tree_attention(self)

    def fresh(self) -> LanguageModel:
        """Share the weights, with an empty cache: how every text begins.

        Raises:
            UnsupportedModelError: the model has been switched since to something that decodes wrongly.
        """
        require_ready(self.model, self.dtype, self.device)
        unpack_linears(self.model, changed=True)
        other = copy.copy(self)
        other._cache = BranchingCache()
        other._last_start = 0
        return other

    def pack(self) -> None:
        """Prepack the large linear layers that are plain, where the model's device and type allow it."""
        if can_prepack(self.model):
            prepack_linears(self.model)

    def unpack(self) -> None:
        """Give the linear layers their plain weights back, for good; texts stay the same, passes take longer."""
        unpack_linears(self.model)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self._cache.length

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the tokens in the cache, without what is held ready for more."""
        layers = (layer for layer in self._cache.layers if isinstance(layer, DynamicLayer))
        tensors = (part for layer in layers for part in (layer.keys, layer.values) if part is not None)
        return sum(part.numel() * part.element_size() for part in tensors)

    def room(self, text: Sequence[int]) -> int:
        """Tokens that can still be read after a text whose beginning is in the cache; negative if it is too long."""
        return self.context_limit - len(text)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Read tokens after those in the cache, and append them to it.

        Args:
            tokens: shape (tokens,), integer ids on the model's device.
            tree: how the tokens hang together; by default each follows the one before it. A tree with more nodes than
                there are tokens is one that grows: its first nodes are the last tokens in the cache, the rest are new.
            last: return only this many last rows of scores, for instance 1 for a prompt; by default all.
            rows: return the scores of these tokens alone, shape (wanted,), int64, on the model's device. The output
                layer, dear where the vocabulary is large, does no other work.
            hidden: also return the last hidden states of the tokens whose scores are returned.

        Raises:
            PromptError: the text would grow past the model's context limit.
            ValueError: a growing tree does not fit the number of tokens.
        """
        cached, count = self.length, tokens.shape[0]
        start = cached if tree is None else cached + count - len(tree)
        end = start + (count if tree is None else tree.height)
        if end > self.context_limit:
            raise PromptError(
                f"{self.name} has a context of {self.context_limit} tokens; {start} are cached and {end - start} more "
                "were given. Shorten the prompt or generate fewer tokens."
            )
        started = time.perf_counter()
        if tree is None:
            mask = _causal_mask(start, count, self._mask_value, self.dtype, self.device)
            positions = _numbers(start + count, self.device)[start : start + count]
        else:
            if not 0 <= start <= cached:
                raise ValueError(
                    f"a tree of {len(tree)} nodes cannot end in {count} new tokens after {cached} in the cache"
                )
            mask = _tree_mask(tree, start, count, self._mask_value, self.dtype, self.device)
            positions = tree.on(self.device)[0][-count:] + start
        self.mask_seconds = time.perf_counter() - started
        with _output_layer_watched(self.model, hidden) as states:
            output = self.model(
                input_ids=tokens.unsqueeze(0),
                attention_mask=mask,
                position_ids=positions.unsqueeze(0),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=(last or 0) if rows is None else rows,
            )
        self._last_start = start
        return Logits(output.logits[0].float(), states[-1][0] if hidden else None)

    def read(self, tokens: Sequence[int], *, hidden: bool = False) -> Tensor | None:
        """Append a text to the cache, in parts, so that no mask is as long as it is wide. Errors as `forward`.

        Args:
            tokens: of the text, ids.
            hidden: return the hidden state of its last token, shape (hidden size,).
        """
        state: Tensor | None = None
        for start in range(0, len(tokens), _PART):
            part = torch.tensor(tokens[start : start + _PART], device=self.device)
            states = self.forward(part, last=1, hidden=hidden).hidden
            state = None if states is None else states[-1]
        return state

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Keep only the tokens (or tree nodes) in `path`, ascending, from the last forward pass; drop the rest."""
        self._cache.gather(self._last_start, list(path))

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self._cache.cut(length)


@contextlib.contextmanager
def _output_layer_watched(model: PreTrainedModel, watched: bool) -> Iterator[list[Tensor]]:
    """Collect what the output layer reads, if it is to be watched, shapes (1, tokens, hidden size).

    transformers' own `output_hidden_states` leaves hooks in every layer behind, which slow all later passes down (by
    a sixth, with layers as small as those of the shipped models), and with which a model cannot be pickled.
    """
    states: list[Tensor] = []
    if not watched:
        yield states
        return
    handle = output_module(model).register_forward_pre_hook(lambda _, read: states.append(read[0]))
    try:
        yield states
    finally:
        handle.remove()


def _context_limit(config: object) -> int:
    limits = [
        value
        for name in ("max_position_embeddings", "n_positions", "sliding_window", "attention_chunk_size")
        # Up to the window's length sliding attention is full attention, which is what the masks here express.
        if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    return min(limits, default=2**31 - 1)


@lru_cache(maxsize=16)
def _strip(capacity: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask of which every short causal mask with up to `capacity` cached tokens is a slice."""
    ahead = torch.arange(capacity + _STRIP_ROWS, device=device) - capacity
    hidden = ahead.unsqueeze(0) > torch.arange(_STRIP_ROWS, device=device).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, value)


def _numbers(count: int, device: torch.device) -> Tensor:
    """At least the numbers from 0 to `count` - 1, shape (>= count,), kept from one pass to the next."""
    return _numbers_to(max(256, 1 << (count - 1).bit_length()), device)


@lru_cache(maxsize=8)
def _numbers_to(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _causal_mask(start: int, count: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if count <= _STRIP_ROWS:
        capacity = max(256, 1 << (start - 1).bit_length()) if start else 256
        mask = _strip(capacity, value, dtype, device)[:count, capacity - start : capacity + count]
        if device.type != "cpu":  # fused kernels want aligned rows
            mask = mask.contiguous()
    else:
        mask = torch.full((count, start + count), value, dtype=dtype, device=device).triu_(start + 1)
    return mask[None, None]


def _tree_mask(
    tree: TokenTree, start: int, count: int, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    mask = torch.zeros(count, start + len(tree), dtype=dtype, device=device)
    mask[:, start:].masked_fill_(tree.on(device)[1][-count:], value)
    return mask[None, None]


def _try_tree_attention(model: LanguageModel) -> None:
    """Compare a branch of a small tree with the same tokens read in a row; refuse the model if they differ."""
    trial = model.fresh()
    kind = type(model.model).__name__
    tokens = torch.arange(1, 7, device=model.device) % model.vocabulary_size
    try:
        trial.forward(tokens[:2])
        branch = trial.forward(tokens[2:5], TokenTree((-1, -1, 1))).scores[2]
        trial.keep([1, 2])
        after = trial.forward(tokens[5:6]).scores[0]
        in_a_row = tokens[[0, 1, 3, 4, 5]].unsqueeze(0)
        with torch.inference_mode():
            expected = model.model(input_ids=in_a_row, use_cache=False).logits[0].float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{kind} cannot do tree attention through a 4-D mask and position ids ({error}). Choose an architecture "
            "with rotary or learned positions and a plain key/value cache, such as Llama, Qwen2, OPT or GPT-2."
        ) from error
    if expected.isnan().any():
        raise NumericalError(f"{model.name} gives NaN logits on a trial input: its weights are broken; load it anew.")
    scale = expected.std().clamp(min=1e-6)
    error_size = torch.stack([branch - expected[-2], after - expected[-1]]).abs().max() / scale
    if not error_size < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.2):
        raise UnsupportedModelError(
            f"{kind} gives other logits for a branch of a tree than for the same tokens in a row (off by "
            f"{error_size:.2g} standard deviations), so drafts cannot be checked in one pass. Choose an architecture "
            "with rotary or learned positions, such as Llama, Qwen2, OPT or GPT-2."
        )


# OpenMP's threads do not survive a fork, which is how Gymnasium's asynchronous vector environments start on Linux: a
# child whose parent has used them waits for ever at its first wide operation. So children decode with one thread each,
# which is also what several of them on one machine want.
_threads_of_parent: int | None = None


def decoding_threads() -> int:
    """Return the CPU threads of decoding here; in a forked child its parent's, so that both share a latency profile."""
    return _threads_of_parent or torch.get_num_threads()


def _use_one_thread() -> None:
    global _threads_of_parent
    _threads_of_parent = decoding_threads()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_use_one_thread)


SAME = 0.997
"""Mean cosine of two probes above which they are of one model: rounded to bfloat16 or to eight bits it stays above
that, and a few steps of further training take it below (both are tested)."""
_TOKENS = 16


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
