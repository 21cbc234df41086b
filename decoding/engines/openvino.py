"""OpenVINO GenAI: pipelines with a draft model or prompt lookup, in an interpreter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..files import cache_folder
from ..loading.presets import path_exists
from ..traits import Knob
from .engine import LOOKUP, EngineOptions, Served
from .pipe import PipeEngine

_LONGEST = 64
"""Longest draft on offer, in tokens; OpenVINO GenAI takes any."""
_WARM_UP = "Once upon a time there was"
_SPARE = 4
"""Tokens of a warm-up beyond those of a draft."""


class OpenVINO(PipeEngine):
    """OpenVINO GenAI on the CPU, with one pipeline that decodes plainly and another with drafts.

    By default it computes as OpenVINO chooses: in bfloat16 where the processor has it, with activations quantised on
    the fly where weights are. Greedy text then changes with the draft length; with `EngineOptions.float32` it does not.

    Args:
        target: folder with IR and tokenizer (openvino_model.xml, openvino_tokenizer.xml and their kin), or a GGUF file,
            of which IR is made once in specgym's cache.
        draft: likewise, with the target's tokenizer; `LOOKUP` for prompt lookup; None for no draft.
        options: how the engine is run.

    Raises:
        ArgumentError: a file is missing or no such folder, or an address or a program is set.
    """

    name = "openvino"
    package = "openvino-genai 2026.4.1"
    module = "openvino_worker"
    installed_as = "openvino-genai"

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        super().__init__(target, draft, options)
        for role, model in (("target", target), ("draft", draft)):
            if model not in (None, LOOKUP):
                _check_model(role, str(model))
        # assistant_confidence_threshold is no knob: it drafts exactly one token a round, whatever its value, and is
        # refused beside a length. With a draft the default length is five; prompt lookup has no defaults, and these are
        # of openvino.genai, samples/python/text_generation/prompt_lookup_decoding_lm.py.
        default = 5
        length = Knob(
            "num_assistant_tokens", 0, _LONGEST, default, True, "tokens drafted a round, at most", search=(0, 24)
        )
        ngram = Knob("max_ngram_size", 1, 16, 3, True, "longest n-gram looked up in the text", search=(1, 6))
        self.knobs = (length, ngram) if draft == LOOKUP else (length,)
        self.length_knob = length.name
        # Sampler::validate_candidate keeps a token of a draft by the draft's probability over the target's
        # (openvino.genai, src/cpp/src/sampling/sampler.cpp); prompt lookup compares tokens.
        self.lossless_when_sampling = draft in (None, LOOKUP)

    def models(self) -> Mapping[str, Any]:
        """Return the models, the arithmetic and the number of threads."""
        return {
            "target": _path(self.target),
            "draft": None if self.draft in (None, LOOKUP) else _path(str(self.draft)),
            "lookup": self.draft == LOOKUP,
            "threads": self.options.threads,
            "float32": self.options.float32,
            "kept": str(cache_folder() / "engines" / "openvino"),
        }

    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        """Let the worker decode with a setting, after a text that is not timed.

        The plugin compiles kernels when a pass first reads so many tokens, which would count against the setting.

        Args, errors as for `Engine.serve`.
        """
        served = super().serve(knobs)
        length = 0 if knobs is None else int(self.resolve_knobs(knobs)[self.length_knob])
        if length:
            served.generate(_WARM_UP, length + _SPARE)
        return served


def _path(model: str) -> str:
    return str(Path(model).expanduser().resolve())


def _check_model(role: str, model: str) -> None:
    """Refuse what is neither IR nor a GGUF file.

    Raises:
        ArgumentError: what is missing.
    """
    way_out = (
        "name a folder with IR and tokenizer, as `optimum-cli export openvino` writes it, or a GGUF file "
        "(`python -m specgym.decoding.engines.gguf` makes one of a draft of ours)"
    )
    place = Path(model).expanduser()
    if not path_exists(model):
        raise ArgumentError(f"the {role} {model} is no file or folder; {way_out}")
    if place.is_dir():
        for file in ("openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
            if not (place / file).is_file():
                raise ArgumentError(f"the {role}'s folder {model} has no {file}; {way_out}")
    elif place.suffix != ".gguf":
        raise ArgumentError(f"the {role} {model} is no folder and no GGUF file; {way_out}")
