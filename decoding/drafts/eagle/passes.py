"""Passes of an EAGLE head along a text, captured as graphs of torch's operations once they come often.

A head is so small that Python around its operations takes a third of its time and more (`models/captured.py`).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.attention import causal_mask
from ...models.captured import CAPTURING, traced
from ...models.kv_cache import PreallocatedLayer, TokenTree
from ...models.linear_layers import only_looking
from .head import EagleHead

_LOG = logging.getLogger("specgym")
_USES = 8
_MOST_TOKENS = 8


class _Pass(nn.Module):
    """One pass as a function of tensors alone, and what it needs as parts.

    Args:
        head: whose pass it is.
        alone: whether it reads a state of the head's own, or those of the target.
    """

    def __init__(self, head: EagleHead, alone: bool) -> None:
        super().__init__()
        self.head, self.alone = head, alone
        self.embeddings, self.output = head.embeddings, head.output  # which are no parts of the head

    def forward(
        self, tokens: Tensor, read: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the head's state at the last position, shape (1, h), and the scores there, (1, vocabulary)."""
        head = self.head
        feature = read if self.alone else head.fused(read)
        embedding = self.embeddings(tokens).to(feature.dtype)
        hidden = head.midlayer(embedding, feature, (cosines, sines), keys, values, mask)[-1:]
        return hidden, head.all_scores(hidden).float()


class HeadPasses:
    """The passes of a head, shared by all its texts.

    Args:
        head: attached to its target, packed.

    Attributes:
        patience: passes of a kind until it is captured.
    """

    patience = _USES

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._parts = {alone: _Pass(head, alone).eval() for alone in (True, False)}
        self._graphs: dict[tuple[bool, int], Any] = {}
        self._uses = Counter[tuple[bool, int]]()
        self._aside = head.norm.weight.device.type != "cpu"
        self._state: Hashable = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graphs out of pickles and copies, which torch cannot write."""
        return {**vars(self), "_graphs": {}, "_uses": Counter()}

    def renew(self) -> None:
        """Forget what was captured of a head that was changed since; for the start of a text."""
        if self._graphs and self._state != self._weights():
            self._graphs.clear()
            self._uses.clear()

    def _weights(self) -> Hashable:
        """All that a graph depends on, to be compared."""
        with only_looking():
            return tuple(
                (type(module), id(tensor), 0 if tensor.is_inference() else tensor._version)
                for part in self._parts.values()
                for module in part.modules()
                for tensor in module.parameters(recurse=False)
            )

    def read(self, tokens: Tensor, states: Tensor, start: int, cache: PreallocatedLayer) -> tuple[Tensor, Tensor]:
        """Read positions of which the target's states are known.

        Args:
            tokens: after each position, shape (n,), int64.
            states: of the target, shape (n, layers * target width).
            start: number of the first position.
            cache: keys and values of the positions before, to which these are added.

        Returns:
            The head's state at the last position, shape (1, h), and the scores there, shape (1, vocabulary), float32.
        """
        return self._run(False, tokens, states.to(self._head.norm.weight.dtype), start, cache)

    def go_on(self, token: Tensor, hidden: Tensor, start: int, cache: PreallocatedLayer) -> tuple[Tensor, Tensor]:
        """Read a position of which nothing but the head's own state before it is known, shapes (1,) and (1, h)."""
        return self._run(True, token, hidden, start, cache)

    @torch.inference_mode()
    def branch(
        self, tokens: Tensor, before: Tensor, tree: TokenTree, start: int, cache: PreallocatedLayer
    ) -> tuple[Tensor, Tensor]:
        """Read the last nodes of a tree of candidates.

        Args:
            tokens: of the nodes, shape (n,), int64.
            before: the head's state at the parent of each, shape (n, h).
            tree: of all candidates so far; it hangs behind the first ``start`` positions.
            start: positions of the text.
            cache: keys and values of those, and of the earlier nodes behind them.

        Returns:
            The head's states, shape (n, h), and scores, shape (n, vocabulary), float32.
        """
        head, count = self._head, tokens.shape[0]
        places, hidden_from = tree.on(tokens.device)
        places = places[-count:] + start
        cosines, sines = (part[places] for part in head.rotation(0, start + tree.height))
        keys, values = (part[:, :, : start + len(tree)] for part in cache.extended(count))
        mask = before.new_zeros(count, start + len(tree))
        mask[:, start:].masked_fill_(hidden_from[-count:], torch.finfo(mask.dtype).min)
        embedding = head.embeddings(tokens).to(before.dtype)
        hidden = head.midlayer(embedding, before, (cosines, sines), keys, values, mask)
        return hidden, head.all_scores(hidden).float()

    @torch.inference_mode()
    def _run(
        self, alone: bool, tokens: Tensor, read: Tensor, start: int, cache: PreallocatedLayer
    ) -> tuple[Tensor, Tensor]:
        key = (alone, tokens.shape[0])
        inputs = self._inputs(tokens, read, start, cache)
        graph = self._graphs.get(key)
        if graph is not None:
            hidden, scores = graph(*inputs)
            return hidden, scores
        result: tuple[Tensor, Tensor] = self._parts[alone](*inputs)
        if not self._aside and key[1] <= _MOST_TOKENS:
            self._uses[key] += 1
            if self._uses[key] >= self.patience:
                self._capture(key, inputs)
        return result

    def _inputs(self, tokens: Tensor, read: Tensor, start: int, cache: PreallocatedLayer) -> tuple[Tensor, ...]:
        count, shape = tokens.shape[0], self._head.shape
        if not cache.is_initialized:
            nothing = read.new_empty(1, shape.kv_heads, 0, shape.head_dim)
            cache.update(nothing, nothing)
        assert cache.length == start
        keys, values = (part[:, :, : start + count] for part in cache.extended(count))
        mask = causal_mask(start, count, torch.finfo(read.dtype).min, read.dtype, read.device)[0, 0]
        return tokens, read, *self._head.rotation(start, start + count), keys, values, mask

    def _capture(self, key: tuple[bool, int], inputs: tuple[Tensor, ...]) -> None:
        """Record a pass of this kind, unless its graph gives other numbers at any length of text."""
        alone, count = key
        part, device = self._parts[alone], self._head.norm.weight.device
        generator = torch.Generator(device).manual_seed(0)

        def trial(length: int) -> tuple[Tensor, ...]:
            cache = PreallocatedLayer()
            shape = self._head.shape
            stored = torch.randn(1, shape.kv_heads, length, shape.head_dim, generator=generator)
            cache.update(stored, stored)
            tokens = torch.randint(shape.vocabulary_size, (count,), generator=generator)
            read = torch.randn(inputs[1].shape, generator=generator)
            return self._inputs(tokens, read.to(inputs[1].dtype), length, cache)

        def is_right(graph: Callable[..., Any]) -> bool:
            for length in (5, 31, 0):
                arguments = trial(length)
                expected = [value.clone() for value in part(*arguments)]
                for _ in range(2):  # torch.jit looks at the first runs and changes the graph after them
                    if not all(map(torch.equal, graph(*arguments), expected)):
                        return False
            return True

        try:
            with CAPTURING, warnings.catch_warnings(), only_looking():
                warnings.simplefilter("ignore")
                graphs = traced(part, trial(9))
            graph = next(filter(is_right, graphs), None)
            if graph is None:
                raise RuntimeError("its graph gives other scores")
            self._graphs[key], self._state = graph, self._weights()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the tracer raises whatever there is
            self._aside = True
            _LOG.info("passes of %s are not captured: %s: %s", self._head.name, type(error).__name__, error)
