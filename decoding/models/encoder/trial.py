"""Trials of whether an encoder-decoder, read in chains, gives what `generate()` gives; see `models/trial.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ..shrink import CONTEXT, START, random_model, shrunken
from ..supported import dynamic_scales
from ..trial import (
    FAILURES,
    Reading,
    Role,
    Trial,
    Wrap,
    closeness,
    difference,
    problem_of_trial,
)

if TYPE_CHECKING:
    from ..language_model import LanguageModel

_SOURCES = (5, 14)
_LONGEST = CONTEXT - 2


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
        config = shrunken(model.config)
        if config is None:
            return "no small copy of it has all kinds of its layers"
        for name in ("dtype", "_name_or_path", "quantization_config"):
            vars(config).pop(name, None)
        key = type(model), json.dumps(config.to_dict(), sort_keys=True, default=str)
        if key not in _problems:
            _problems[key] = _walked(random_model(type(model), config), reading, wrap)
    except FAILURES as error:
        return f"no small copy of it can be read in chains ({type(error).__name__}: {error})"
    return _problems[key]


def _walked(model: Any, reading: Reading, wrap: Wrap) -> str | None:
    """Verify texts of a small model piece by piece, with wrong tokens at the ends, and compare with `generate()`."""
    settings = GenerationConfig(
        max_new_tokens=_LONGEST, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
        decoder_start_token_id=START, output_logits=True, return_dict_in_generate=True,
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
            if problem := difference(
                scores, known[place : place + len(right)], known, closeness(torch.float32), reading
            ):
                return f"{problem} at the {place}th token of a small copy"
            accepted = max(1, len(right) - turn % 2)
            reader.keep(range(accepted))
            place, turn = place + accepted, turn + 1
    return None


def _problem_with(model: PreTrainedModel, start: int, reading: Reading, wrap: Wrap) -> str | None:
    """Fault that shows when the model itself reads a few tokens; None if none does."""

    def read(trial: LanguageModel) -> Trial:
        source = [token % (trial.source_vocabulary or trial.vocabulary_size) for token in range(3, 10)]
        tokens = torch.tensor([start, *(token % trial.vocabulary_size for token in range(5, 9))], device=trial.device)
        reader, _ = trial.begin(source)
        parts = [reader.forward(tokens[:2]).scores]
        wrong = reader.forward(torch.cat([tokens[2:4], tokens[:1]]))
        reader.keep([0, 1])
        parts += [wrong.scores[:2], reader.forward(tokens[4:]).scores]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([source], device=trial.device)}
        expected = model(**inputs, decoder_input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
        return torch.cat(parts), expected, expected

    return problem_of_trial(model, reading, wrap, read)
