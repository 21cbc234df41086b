"""Trials of how a model has to be read so that it gives what `generate()` gives.

A configuration declares windows, chunks and switches of the rotation, and they show far behind the tokens that a real
model can be tried on in reasonable time. So a copy of the configuration is shrunk until they are a few tokens long, a
small model with random weights is made of it, and texts are read through all of them, in trees with wrong branches or
in chains with wrong ends, and compared with the logits of `generate()`. The real model is tried on a few tokens
besides.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import NumericalError, UnsupportedModelError
from .attention import Spans, declared_spans
from .kv_cache import TokenTree
from .shrink import random_model, shrunken
from .supported import dynamic_scales

if TYPE_CHECKING:
    from .language_model import LanguageModel

_LOG = logging.getLogger("specgym")
UNLIMITED = 2**31 - 1
FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)
"""Errors that a model raises where it cannot be read in some way."""
_CLOSE = 1e-3
"""Largest difference of logits in standard deviations, in float32."""
_CLOSE_IN_HALF = 0.2
CLOSE_FOR_A_DRAFT = 1.0
"""For a draft, whose rounding may go by the pass: eight bits are off by less, and what is misread by several."""


@dataclass(frozen=True)
class Switch:
    """Place in a text at which a model changes its rotation of positions (longrope).

    Attributes:
        position: tokens of the longest text that is read in the short way.
        rereads: whether stock decoding reads the whole text again when it passes that; otherwise what was read stays.
    """

    position: int
    rereads: bool


_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Reading:
    """A way to read a model.

    Attributes:
        spans: how far the layers see, for masks that verify trees; None for chains with the model's own masks.
        switch: of the rotation of positions.
        context_limit: tokens up to which this is known to be right.
        singly: read a token a pass, but for the prompt; for recurrent layers that begin anew in every longer pass.
        exact: whether passes of all shapes give the scores of `generate()`, as a target's have to. A draft's need not:
            what it proposes is verified, by the scores that it was drawn from.
        why_no_branches: reason for `spans` to be None.
    """

    spans: Spans | None = None
    switch: Switch | None = None
    context_limit: int = UNLIMITED
    singly: bool = False
    exact: bool = True
    why_no_branches: str = ""


Wrap = Callable[[PreTrainedModel, Reading], "LanguageModel"]
Role = Literal["target", "draft"]
Trial = tuple[Tensor, Tensor, Tensor]
"""Scores of tokens that were read in parts, the same in a row, and of all tokens of that; (tokens, vocabulary)."""


def declared_context(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that a configuration declares."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    values = [getattr(config, name, None) for name in names]
    return min((value for value in values if isinstance(value, int) and value > 0), default=UNLIMITED)


def settle(model: PreTrainedModel, wrap: Wrap, role: Role = "target") -> Reading:
    """Choose the way to read a model, by trying.

    Args:
        model: in evaluation mode.
        wrap: makes a language model of it that is read in a certain way.
        role: a draft whose own arithmetic goes by the pass, in a small copy of which without it all is right, is read
            in chains.

    Raises:
        UnsupportedModelError: no way gives what the model gives.
        NumericalError: the model's weights give NaN.
    """
    config = model.config.get_text_config(decoder=True)
    small = _small_model(model)
    problems: list[str] = []
    scales = dynamic_scales(model, model.modules())
    if scales is not None:
        problems.append(f"it is {scales.what}")
    for reading in _candidates(model, config):
        if scales is not None and reading.spans is not None:
            continue
        if small is None:
            reading = _limited(reading, config)
        else:
            problem = small.problem(reading, wrap)
            if problem is not None:
                problems.append(problem)
                continue
        problem = None if scales is not None else _problem_with(model, reading, wrap)
        if role == "draft" and reading.spans is None and (problem or scales):
            reading = replace(reading, exact=False)
            problem = _problem_with(model, reading, wrap)
        if problem is None:
            if reading.spans is None and not reading.why_no_branches:
                reading = replace(reading, why_no_branches=problems[0] if problems else "")
            if reading.singly:
                _LOG.warning(
                    "%s gives other scores in passes over several tokens than over one, so it is read a token a pass: "
                    "texts are right, and drafts make nothing faster",
                    type(model).__name__,
                )
            return reading
        problems.append(problem)
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be decoded speculatively: {problems[-1]}. Choose an architecture with a cache "
        "of keys and values, or of states, such as Llama, Qwen, Gemma, Mistral, OPT, GPT-2 or Mamba."
    )


def _candidates(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[Reading]:
    position = next((int(part[_ORIGINAL]) for part in _longrope(config)), 0)
    switches = [Switch(position, False), Switch(position, True)] if 0 < position < declared_context(config) else [None]
    all_spans, why = declared_spans(model, config)
    for spans in [*all_spans, None] if not _limits_time_steps(model) else ():
        for switch in switches:
            yield Reading(spans, switch, why_no_branches=why if spans is None else "")
    yield Reading(None, singly=True, why_no_branches=why)


def _limited(reading: Reading, config: PreTrainedConfig) -> Reading:
    """Restrict a reading to texts within all windows and switches, for a model that cannot be tried behind them."""
    names = ("sliding_window", "window_size", "attention_chunk_size")
    sizes = [getattr(config, name, None) for name in names] if reading.spans is not None else []
    sizes += [reading.switch.position if reading.switch is not None else None]
    limit = min((size for size in sizes if isinstance(size, int) and size > 0), default=UNLIMITED)
    if limit < declared_context(config):
        _LOG.warning(
            "no small copy of a %s can be made to try it behind its attention window or the switch of its rotation, so "
            "its context ends there, after %d tokens",
            type(config).__name__, limit,
        )  # fmt: skip
    return replace(reading, context_limit=limit)


def _limits_time_steps(model: PreTrainedModel) -> bool:
    """True for state spaces whose time steps stock code limits in passes over several tokens, and not over one.

    Nemotron-H and Zamba 2 (transformers 5.23, their `time_step_limit` and `mamba2_selective_state_update`).
    """
    limits = (getattr(module, "time_step_limit", None) for module in model.modules())
    return any(limit is not None and (limit[0] > 0 or limit[1] < float("inf")) for limit in limits)


def _longrope(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The parameters of every rotation that switches."""
    parameters = getattr(config, "rope_parameters", None)
    parts = [parameters, *parameters.values()] if isinstance(parameters, dict) else []
    for part in parts:
        if isinstance(part, dict) and part.get("rope_type") == "longrope" and part.get(_ORIGINAL):
            yield part


def _problem_with(model: PreTrainedModel, reading: Reading, wrap: Wrap) -> str | None:
    """Fault that shows when the model itself reads a few tokens; None if none does."""

    def read(trial: LanguageModel) -> Trial:
        tokens = torch.arange(1, 7, device=trial.device) % trial.vocabulary_size
        trial.forward(tokens[:2])
        if reading.spans is not None:
            drafted = trial.forward(tokens[2:5], TokenTree((-1, -1, 1))).scores[2]
            trial.keep([1, 2])
        else:
            drafted = trial.forward(tokens[[3, 4, 2]]).scores[1]
            trial.keep([0, 1])
        after = trial.forward(tokens[5:6]).scores[0]
        in_a_row: dict[str, Any] = {"input_ids": tokens[[0, 1, 3, 4, 5]].unsqueeze(0), "use_cache": False}
        if "position_ids" in signature(model.forward).parameters:  # as `generate` gives them
            in_a_row["position_ids"] = torch.arange(5, device=trial.device).unsqueeze(0)
        expected = model(**in_a_row).logits[0].float()
        return torch.stack([drafted, after]), expected[-2:], expected

    return problem_of_trial(model, reading, wrap, read)


def problem_of_trial(
    model: PreTrainedModel, reading: Reading, wrap: Wrap, read: Callable[[LanguageModel], Trial]
) -> str | None:
    """Return the fault that shows when a model itself reads a few tokens; None if none does.

    Args:
        model: in evaluation mode.
        reading: to be tried.
        wrap: makes a language model of it that is read in a certain way.
        read: reads the tokens.

    Raises:
        NumericalError: the model's weights give NaN.
    """
    try:
        trial = wrap(model, reading)
        with torch.inference_mode():
            scores, expected, all_expected = read(trial)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"it cannot read {_shape(reading)} ({type(error).__name__}: {error})"
    if all_expected.isnan().any():
        raise NumericalError(f"{trial.name} gives NaN logits on a trial input: its weights are broken; load it anew.")
    close = closeness(model.dtype) if reading.exact else CLOSE_FOR_A_DRAFT
    return difference(scores, expected, all_expected, close, reading)


def closeness(dtype: torch.dtype) -> float:
    """Return the largest difference that rounding makes between logits, in standard deviations."""
    return _CLOSE if dtype in (torch.float32, torch.float64) else _CLOSE_IN_HALF


def difference(scores: Tensor, expected: Tensor, scale: Tensor, close: float, reading: Reading) -> str | None:
    """Return in words that scores are not those expected; None if they are, up to rounding.

    Args:
        scores: shape (tokens, vocabulary).
        expected: likewise.
        scale: scores whose standard deviation the difference is measured by.
        close: largest difference, in those.
        reading: that gave the scores.
    """
    size = (scores - expected).abs().max() / scale.std().clamp(min=1e-6)
    if size < close:
        return None
    return f"it gives other logits in {_shape(reading)} than in a row (off by {size:.2g} standard deviations)"


def _shape(reading: Reading) -> str:
    return "a tree of candidates" if reading.spans is not None else "a chain of candidates"


class _Text(NamedTuple):
    """A text of a small model, and what `generate()` saw of it."""

    tokens: list[int]
    prompt: int
    """Tokens of the prompt."""
    logits: Tensor
    """Scores of every generated token, shape (generated, vocabulary), float32."""


class _SmallModel:
    """A model of a shrunken configuration, with the texts that it generates."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[int]) -> None:
        self._model: Any = model
        self._limit = declared_context(model.config)
        self._texts = [self._generated(length, min(self._limit, 40)) for length in prompts]
        self._problems: dict[str, str | None] = {}

    def _generated(self, prompt: int, end: int) -> _Text:
        tokens = [1 + 7 * place % 30 for place in range(prompt)]
        ids = torch.tensor([tokens])
        settings = GenerationConfig(max_new_tokens=end - prompt, do_sample=False, eos_token_id=None, pad_token_id=0)
        settings.output_logits = settings.return_dict_in_generate = True
        with torch.inference_mode():
            output = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return _Text(output.sequences[0].tolist(), prompt, torch.cat(output.logits).float())

    def problem(self, reading: Reading, wrap: Wrap) -> str | None:
        """Fault of a reading of models of this kind; None if none shows."""
        reading = self._scaled(reading)
        key = repr(reading)
        if key not in self._problems:
            self._problems[key] = next(filter(None, (self._walk(text, reading, wrap) for text in self._texts)), None)
        return self._problems[key]

    def _scaled(self, reading: Reading) -> Reading:
        """Reading of the small model, whose windows and switch are shorter."""
        config = self._model.config
        small, _ = declared_spans(self._model, config)
        sizes = {span.kind: span.size for spans in small for span in spans.values()}
        switch, spans = reading.switch, reading.spans
        if switch is not None:
            switch = replace(switch, position=next(int(part[_ORIGINAL]) for part in _longrope(config)))
        if spans is not None:
            spans = {kind: replace(span, size=sizes[span.kind]) for kind, span in spans.items()}
        return replace(reading, spans=spans, switch=switch)

    def _walk(self, text: _Text, reading: Reading, wrap: Wrap) -> str | None:
        """Verify a text piece by piece, with wrong candidates beside it, and compare the logits."""
        try:
            model, length, turn = wrap(self._model, reading), text.prompt, 0
            model.read(text.tokens[: length - 1], of=length)
            while length < len(text.tokens):
                depth = min(1 + turn % 3, model.pass_limit(length - 1) - length, len(text.tokens) - length)
                right = text.tokens[length - 1 : length + depth]
                wrong = [(token + 1) % model.vocabulary_size for token in right[1:]]
                if reading.spans is None:
                    more = min(2, model.pass_limit(length - 1) - length - depth)
                    read = torch.tensor(right + [3, 4][:more])
                    scores = model.forward(read).scores[: depth + 1]
                else:  # the right path between wrong siblings
                    tokens, parents, path = [right[0]], [-1], [0]
                    for place in range(depth):
                        parents += [path[-1], path[-1]]
                        tokens += [wrong[place], right[place + 1]]
                        path.append(len(tokens) - 1)
                    scores = model.forward(torch.tensor(tokens), TokenTree(parents)).scores[path]
                known = text.logits[length - text.prompt : length - text.prompt + depth + 1]
                problem = difference(scores[: len(known)], known, text.logits, _CLOSE, reading)
                if problem is not None:
                    return f"{problem} at the {length}th token of a small copy with short windows"
                accepted = max(0, depth - turn % 2)
                model.keep(list(range(accepted + 1)) if reading.spans is None else path[: accepted + 1])
                length, turn = length + accepted + 1, turn + 1
        except FAILURES as error:
            return f"a small copy with short windows cannot read {_shape(reading)} ({type(error).__name__}: {error})"
        return None


def _small_model(model: PreTrainedModel) -> _SmallModel | None:
    """A small model of the same kind; None if none can be made."""
    try:
        config = shrunken(model.config.get_text_config(decoder=True))
    except FAILURES as error:  # configurations check what they are given
        config = None
        _LOG.debug("no small copy of %s: %s: %s", type(model.config).__name__, type(error).__name__, error)
    if config is None:
        return None
    config._attn_implementation = model.config._attn_implementation
    kind = type(model) if type(model.config) is type(config) else None
    # Neither the place that a configuration was read from nor its type counts: a draft is mostly of its target's kind.
    described = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    key = (kind, json.dumps(described, sort_keys=True, default=str))
    if key not in _small_models:
        _small_models[key] = _made(kind, config)
    return _small_models[key]


_small_models: dict[tuple[type[PreTrainedModel] | None, str], _SmallModel | None] = {}
_PROMPTS = (5, 14)
"""Tokens of the texts' prompts: within the small windows, and behind them and the switch."""


def _made(kind: type[PreTrainedModel] | None, config: PreTrainedConfig) -> _SmallModel | None:
    try:
        model = random_model(kind or AutoModelForCausalLM.from_config, config)
        return _SmallModel(model, _PROMPTS)
    except FAILURES as error:
        _LOG.debug("no small copy of %s: %s: %s", type(config).__name__, type(error).__name__, error)
        return None
