"""Passes over few tokens, captured as graphs of torch's operations.

Around a pass over a few tokens of a small model, Python and the modelling code take longer than the arithmetic. So a
shape of pass that comes again and again is recorded once, by `torch.jit.trace`, and run without them from then on: the
same operations in the same order on the same weights, with the tokens, their positions, the mask and the cache for
inputs. A graph is used only if it gives the scores of the model itself to the last bit, at other lengths of text than
that at which it was recorded, in a chain and in a tree; a model with which anything else happens is left aside.

`torch.jit` is on its way out (torch 2.13 says so), and what it is replaced by takes a compiler and a minute for every
shape. Where it is missing all passes are the model's own.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from transformers import PreTrainedModel

from .attention import side_by_side
from .joint.cache import Slot, cache_of
from .kv_cache import BranchingCache, TokenTree
from .linear_layers import HalfWeight, PrepackedLinear, only_looking
from .output_layer import output_layer_watched

_LOG = logging.getLogger("specgym")
MOST_TOKENS = 16
"""Tokens of the longest pass that is captured; around longer ones the arithmetic takes longer than Python."""
MOST_ROWS = 64
"""Tokens of the longest pass over several texts that is captured: Python around it takes longer, too."""
USES = 64
"""Passes of a shape before it is captured, which takes as long as 100 of them do (`benchmarks/forward_cost.py`)."""
NEVER = 2**62
"""Passes of a shape that never come."""
LONGEST = 0.1
"""Seconds of a pass beyond which Python around it does not count, and capturing never pays."""
_MOST_GRAPHS = 48
_KNOWN_CHOICES = ("integrations/sdpa_attention.py", "torch/nn/functional.py")
"""Files that choose by sizes which a graph has fixed: of a pass (transformers 5.23), and of embeddings (torch 2.13)."""
OWN = ("torch.nn.modules.", "transformers.", "specgym.")

CAPTURING = threading.Lock()
"""Held while a pass is recorded: the warnings of the tracer are caught, which is one thread's business at a time."""

Mask = Callable[[TokenTree | None, int, int], object]
Kept = Callable[[], Tensor]
"""Hands over what a model keeps of its last pass beside scores, shape (1, tokens, width)."""
_Shape = tuple[int, int, int | None, bool]
"""Texts, tokens of each, scores that are kept (None if they are listed), and whether hidden states are asked for."""


class _Step(nn.Module):
    """One pass as a function of tensors alone.

    Args:
        model: whose pass it is.
        several: whether it reads several texts.
        chosen: rows of scores, as `logits_to_keep`; None if they are an input.
        hidden: whether it returns hidden states, too.
        kept: is returned behind all else, if given.
    """

    def __init__(
        self, model: PreTrainedModel, several: bool, chosen: int | None, hidden: bool, kept: Kept | None
    ) -> None:
        super().__init__()
        self.model, self.several, self.chosen, self.hidden, self.kept = model, several, chosen, hidden, kept

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor, *stored: Tensor) -> Any:
        """Return scores, shape (texts, rows, vocabulary), hidden states if asked for, and what is kept.

        Where there are several texts, `rows` are the places of their tokens in the storage.
        """
        end = mask.shape[-1]
        start, places = end - tokens.shape[1], rows if self.several else None
        with output_layer_watched(self.model, self.hidden) as states:
            scores = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache_of(stored, start, end, places),
                use_cache=True,
                logits_to_keep=rows if self.chosen is None else self.chosen,
            ).logits
        return (scores, *states[-1:], *(() if self.kept is None else (self.kept(),)))


class _TracedPass(nn.Module):
    """A pass as the tracer takes it: a function of tensors, and the weights that it reads as attributes of its own.

    The tracer finds weights in float16 and int8 only there, and others that require gradients. It would also find them
    in the modules that hold them, but makes a module of its own of each, which takes longer than to trace. oneDNN's
    layout it cannot take at all (torch 2.13, "Unsupported value kind"): models with it are left aside.

    Args:
        run: the pass, and all modules that it uses within.
    """

    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        self._run, known = (run,), set[int]()  # in a tuple, so that it is no part of this module
        for number, module in enumerate(run.modules()):
            packed = module.packed if isinstance(module, PrepackedLinear) else getattr(module, "kept_rows", None)
            script = packed.packed if isinstance(packed, HalfWeight) else getattr(module, "int8", None)
            if script is not None:
                setattr(self, f"packed_{number}", script)
            for kind in ("_parameters", "_buffers"):  # of a packed layer without unpacking it
                for name, tensor in vars(module)[kind].items():
                    if id(tensor) not in known:  # it may be shared
                        vars(self)[kind][f"{name}_{number}"] = tensor
                        known.add(id(tensor))
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """Do what the pass does."""
        return self._run[0](*inputs)


def traced(run: nn.Module, inputs: tuple[Tensor, ...]) -> list[Callable[..., Any]]:
    """Record a pass, called with tensors like those of `inputs`; to be done while holding `CAPTURING`.

    What torch traces it keeps to the end of the process, in one place for all (torch 2.13,
    `findings/traces-are-never-freed.sh`): here the place is its own, and goes with the graph.

    Args:
        run: the pass, and all modules that it uses within.
        inputs: of a pass; results are computed for them.

    Returns:
        The graph with the weights for constants, which takes less memory; and as it was traced. They may differ in the
        last bits: how torch multiplies by a weight depends on whether it requires gradients, and constants do not.
    """
    state: Any = torch.jit._state
    everything, state._python_cu = state._python_cu, torch._C.CompilationUnit()
    try:
        module: Any = torch.jit.trace(_TracedPass(run), inputs, check_trace=False, strict=False)
    finally:
        state._python_cu = everything
    graph = torch._C._freeze_module(module._c)._get_method("forward").graph.copy()
    graph.eraseInput(0)  # the module, of which nothing is left to be asked
    return [torch._C._create_function_from_graph("forward", graph), module]


class _Aside(Exception):
    """Reason for which a model is not captured."""


class CapturedPasses:
    """The captured passes of a model, shared by all its texts.

    Args:
        model: on a CPU, with full control of its masks and positions.
        masks: makes the mask of a pass from its tree, its start and its number of tokens.
        kept: what the model keeps of a pass, which a graph hands to `emptied`.

    Attributes:
        patience: passes of a shape until it is captured; 1 where many are to come.
        graphs: of the shapes that are captured.
    """

    patience = USES

    def __init__(self, model: PreTrainedModel, masks: Mask, kept: Kept | None = None) -> None:
        self._model, self._masks, self._kept = model, masks, kept
        self._latest_kept: Tensor | None = None
        self._uses = Counter[_Shape]()
        self._latest: _Shape = (0, 0, None, False)
        self.graphs = dict[_Shape, Any]()
        self._state: Hashable = None
        self._aside = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graphs out of pickles and copies: torch cannot write them, and they are of this model's weights."""
        return {**vars(self), "graphs": {}, "_uses": Counter(), "_state": None, "_aside": False}

    def renew(self) -> None:
        """Forget what was captured of a model that was changed since; for the start of a text."""
        if (self.graphs or self._aside) and self._state != _state(self._model):
            self.graphs.clear()
            self._uses.clear()
            self._aside = False

    def run(
        self, tokens: Tensor, positions: Tensor, mask: object, cache: object, chosen: int | Tensor, hidden: bool
    ) -> tuple[Tensor, ...] | None:
        """Read tokens by a graph, if there is one for such passes.

        Args:
            tokens: shape (tokens,).
            positions: of these, likewise.
            mask: as for the model; only one for all layers can be captured.
            cache: is written to; another than a `BranchingCache` or a `Slot` is left to the model.
            chosen: as `logits_to_keep` of transformers' models.
            hidden: whether hidden states are asked for.

        Returns:
            Scores, shape (rows, vocabulary), and hidden states, if asked for; None if the model has to read them.
        """
        count, rows = tokens.shape[0], chosen if isinstance(chosen, Tensor) else None
        key = (1, count, None if isinstance(chosen, Tensor) else chosen, hidden)
        self._latest = key
        graph = self.graphs.get(key)
        if graph is None or not (isinstance(mask, Tensor) and isinstance(cache, BranchingCache | Slot)):
            return None
        if torch.is_autocast_enabled("cpu") or (stored := cache.extended(count)) is None:
            return None
        results = graph(tokens[None], positions[None], mask, tokens if rows is None else rows, *stored)
        if self._kept is not None:
            *results, self._latest_kept = results
        return tuple(result[0] for result in results)

    def run_rows(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: object,
        stored: Sequence[Tensor],
        places: Tensor,
        chosen: int,
        hidden: bool,
    ) -> tuple[Tensor, ...] | None:
        """Read tokens of several texts by a graph, if there is one for such passes.

        Args:
            tokens: shape (texts, tokens), two texts or more.
            positions: of these, likewise.
            mask: shape (texts, 1, tokens, positions); only one for all layers can be captured.
            stored: keys and values of every layer, as for `StoredLayer`.
            places: where they are written there, shape (texts, tokens).
            chosen: how many last rows of scores are kept, 0 for all.
            hidden: whether hidden states are asked for.

        Returns:
            Scores, shape (texts, rows, vocabulary), and hidden states, if asked for; None if the model has to read.
        """
        self._latest = key = (*tokens.shape, chosen, hidden)
        graph = self.graphs.get(key)
        if graph is None or not isinstance(mask, Tensor) or torch.is_autocast_enabled("cpu"):
            return None
        results = graph(tokens, positions, mask, places, *stored)
        if self._kept is not None:
            *results, self._latest_kept = results
        return tuple(results)

    def emptied(self) -> Tensor:
        """Return what was kept of the last pass, which is then forgotten here."""
        kept, self._latest_kept = self._latest_kept, None
        assert kept is not None
        return kept

    def took(self, seconds: float) -> None:
        """Count a pass that `run` has left to the model, and capture it if its shape has come often enough."""
        if self._kept is not None:
            self._latest_kept = self._kept()  # before what a capture reads takes its place
        key = self._latest
        small = key[0] * key[1] <= (MOST_TOKENS if key[0] == 1 else MOST_ROWS)
        possible = not self._aside and small and len(self.graphs) < _MOST_GRAPHS
        if key not in self.graphs and possible and seconds < LONGEST:
            self._uses[key] += 1
            if self._uses[key] >= self.patience:
                self._capture(key)

    def _capture(self, key: _Shape) -> None:
        """Record passes of a shape, or put the model aside."""
        self._state = _state(self._model)
        try:
            if self._state is None:
                raise _Aside("it has hooks, or layers that are not transformers' or torch's own")
            with CAPTURING:
                self.graphs[key] = _recorded(self._model, self._masks, self._kept, *key)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the tracer and modelling code raise whatever there is
            self._aside = True
            reason = str(error) if isinstance(error, _Aside) else f"{type(error).__name__}: {error}"
            _LOG.info("passes of %s are not captured: %s", type(self._model).__name__, reason.split("\n")[0])


def _recorded(
    model: PreTrainedModel, masks: Mask, kept: Kept | None, texts: int, count: int, chosen: int | None, hidden: bool
) -> Any:
    """The graph of a pass, after it was compared with the model.

    Raises:
        _Aside: it is not what the model does.
    """
    step = _Step(model, texts > 1, chosen, hidden, kept).eval()
    generator = torch.Generator("cpu").manual_seed(0)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    branches = TokenTree([place - 1 - place % 2 for place in range(count)])
    shapes = [(8, None), (31, None), (31, branches), (5, None)]
    text = torch.randint(vocabulary, (1, 64), generator=generator)
    cache = BranchingCache()
    model(input_ids=text, attention_mask=masks(None, 0, 64), position_ids=torch.arange(64)[None], past_key_values=cache)
    stored = [part.repeat(texts, 1, 1, 1) for part in cache.extended(0) or ()]

    def inputs(start: int, tree: TokenTree | None) -> list[Tensor]:
        starts = [start - text % 4 for text in range(texts)]
        parts = [masks(tree, start, count) for start in starts]
        if not all(isinstance(part, Tensor) for part in parts):
            raise _Aside("its layers see differently far")
        places = torch.arange(count) if tree is None else tree.depths
        began = torch.tensor(starts)[:, None]
        tokens = torch.randint(vocabulary, (texts, count), generator=generator)
        mask = cast(Tensor, side_by_side(cast("list[Tensor]", parts), count, start + count))
        rows = torch.tensor([0, count - 1]) if texts == 1 else began + torch.arange(count)
        return [tokens, began + places, mask, rows, *stored]

    def comparable(outputs: Sequence[Tensor]) -> list[Tensor]:
        return [output.clone() for output in (*outputs, *(part[..., :64, :] for part in stored))]

    with warnings.catch_warnings(record=True) as caught, only_looking():
        warnings.simplefilter("always")
        first = inputs(*shapes[0])
        graphs = traced(step, tuple(first))
    choices = [warning for warning in caught if issubclass(warning.category, torch.jit.TracerWarning)]
    for warning in choices:
        if not warning.filename.replace("\\", "/").endswith(_KNOWN_CHOICES):
            raise _Aside(f"it chooses by numbers of the pass ({warning.filename}:{warning.lineno})")

    def is_right(graph: Callable[..., Any]) -> bool:
        for number, (start, tree) in enumerate(shapes):
            arguments = inputs(start, tree)
            expected = comparable(step(*arguments))
            for _ in range(1 if number else 2):  # torch.jit looks at the first run and changes the graph after it
                if not all(map(torch.equal, comparable(graph(*arguments)), expected)):
                    return False
        return True

    graph = next(filter(is_right, graphs), None)
    if graph is None:
        raise _Aside("its graph gives other scores")
    return graph


def _state(model: PreTrainedModel) -> Hashable:
    """All that a graph depends on, to be compared; None if it may depend on anything else."""
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return None
    state: list[Hashable] = [str(getattr(model.config, "_attn_implementation", ""))]
    for module in model.modules():
        inside = vars(module)
        if inside["_forward_hooks"] or inside["_forward_pre_hooks"] or "forward" in inside:
            return None
        if not type(module).__module__.startswith(OWN):
            return None
        state.append((id(module), type(module), id(inside.get("_packed", inside.get("int8")))))
        for tensor in (*inside["_parameters"].values(), *inside["_buffers"].values()):
            if tensor is not None:
                state.append((id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
    return tuple(state)
