"""Trials of whether an encoder-decoder, read in chains, gives what `generate()` gives; see `models/trial.py`."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...errors import NumericalError, UnsupportedModelError
from ..supported import dynamic_scales
from ..trial import CLOSE_FOR_A_DRAFT, FAILURES, Reading, Role, Wrap, closeness

_LOG = logging.getLogger("specgym")
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "decoder_vocab_size": 64,
    "d_model": 32, "hidden_size": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2,
    "num_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
    "max_position_embeddings": 64, "relative_attention_max_distance": 16, "relative_attention_num_buckets": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
_ENDS = ("forced_bos_token_id", "forced_eos_token_id")
_SOURCES = (5, 14)
_LONGEST = 40


def settle(model: PreTrainedModel, start: int, wrap: Wrap, reading: Reading, role: Role) -> Reading:
    """Return the way in which a model can be read, if trying shows no fault.

    Args:
        model: in evaluation mode.
        start: id with which its texts begin.
        wrap: makes a language model of it that is read in a certain way.
        reading: to be tried.
        role: a draft's own arithmetic may go by the pass.

    Raises:
        UnsupportedModelError: it gives something else than `generate()`, or no small copy of it can be made to try.
        NumericalError: the model's weights give NaN.
    """
    problem = _problem_of_kind(model, reading, wrap)
    if problem is None:
        problem = _problem_with(model, start, reading, wrap)
        if problem is not None and (role == "draft" or dynamic_scales(model, model.modules())):
            reading = replace(reading, exact=False)
            problem = _problem_with(model, start, reading, wrap)
    if problem is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be decoded speculatively: {problem}. Choose an encoder-decoder that reads "
            "and writes text, such as T5, BART, Marian or Pegasus."
        )
    return reading


_problems: dict[tuple[type[PreTrainedModel], str], str | None] = {}


def _problem_of_kind(model: PreTrainedModel, reading: Reading, wrap: Wrap) -> str | None:
    """Fault of all models of a kind, which shows in a small copy with random weights; None if none does."""
    try:
        config = _shrunken(model.config)
        key = type(model), json.dumps(config.to_dict(), sort_keys=True, default=str)
        if key not in _problems:
            _problems[key] = _walked(_small(type(model), config), reading, wrap)
    except FAILURES as error:
        return f"no small copy of it can be read in chains ({type(error).__name__}: {error})"
    return _problems[key]


def _shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    values = vars(small)
    for name, size in _SIZES.items():
        if values.get(name) is not None:
            setattr(small, name, size)
    for name in ("dtype", "_name_or_path", "quantization_config"):
        values.pop(name, None)
    return small


def _small(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: Any = kind(config).float().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.2)
    return model


def _walked(model: Any, reading: Reading, wrap: Wrap) -> str | None:
    """Verify texts of a small model piece by piece, with wrong tokens at the ends, and compare with `generate()`."""
    start = int(_SIZES["decoder_start_token_id"])
    settings = GenerationConfig(
        max_new_tokens=_LONGEST, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
        decoder_start_token_id=start, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    model.generation_config = settings
    for size in _SOURCES:
        source = torch.tensor([[4 + 7 * place % 50 for place in range(size)]])
        with torch.inference_mode():
            output = model.generate(source, attention_mask=torch.ones_like(source))
        text, known = output.sequences[0].tolist(), torch.cat(output.logits).float()
        reader, first = wrap(model, reading).begin(source[0].tolist())
        if first != text[:1]:
            return f"its texts begin with {text[:1]} and not with {first}"
        place, turn = 0, 0
        while place < len(known):
            right = text[place : place + 1 + turn % 4]
            scores = reader.forward(torch.tensor([*right, 5, 6][: _LONGEST - place])).scores[: len(right)]
            if problem := _difference(scores, known[place : place + len(right)], known, closeness(torch.float32)):
                return f"{problem} at the {place}th token of a small copy"
            accepted = max(1, len(right) - turn % 2)
            reader.keep(range(accepted))
            place, turn = place + accepted, turn + 1
    return None


def _problem_with(model: PreTrainedModel, start: int, reading: Reading, wrap: Wrap) -> str | None:
    """Fault that shows when the model itself reads a few tokens; None if none does."""
    try:
        trial = wrap(model, reading)
        source = [token % (trial.source_vocabulary or trial.vocabulary_size) for token in range(3, 10)]
        tokens = torch.tensor([start, *(token % trial.vocabulary_size for token in range(5, 9))], device=trial.device)
        reader, _ = trial.begin(source)
        parts = [reader.forward(tokens[:2]).scores]
        wrong = reader.forward(torch.cat([tokens[2:4], tokens[:1]]))
        reader.keep([0, 1])
        parts += [wrong.scores[:2], reader.forward(tokens[4:]).scores]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([source], device=trial.device)}
        with torch.inference_mode():
            expected = model(**inputs, decoder_input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"it cannot read a chain of candidates ({type(error).__name__}: {error})"
    if expected.isnan().any():
        raise NumericalError(f"{trial.name} gives NaN logits on a trial input: its weights are broken; load it anew.")
    close = closeness(model.dtype) if reading.exact else CLOSE_FOR_A_DRAFT
    return _difference(torch.cat(parts), expected, expected, close)


def _difference(scores: Tensor, expected: Tensor, scale: Tensor, close: float) -> str | None:
    size = (scores - expected).abs().max() / scale.std().clamp(min=1e-6)
    if size < close:
        return None
    return f"it gives other logits in a chain of candidates than in a row (off by {size:.2g} standard deviations)"
