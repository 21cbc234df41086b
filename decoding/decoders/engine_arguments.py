"""Arguments that make an engine decode exactly with a setting of ours: lines of Python, or of a shell.

Each engine takes them in a place of its own, and some ignore without a word what stands elsewhere; the comments say
where that is known from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Final

from ..errors import ArgumentError, one_of
from ..loading.presets import PROMPT_LOOKUP, resolve
from .traits import ENGINE_SETTINGS

NO_DRAFT: Final = "No draft model and no speculative setting: decode with the target alone."
"""Advice where drafts have no tokens."""


def takes_threshold(engine: str, pair: str) -> bool:
    """Return whether an engine ends the drafts of a pair early, by a threshold.

    Prompt lookup copies a fixed number of tokens in every engine.

    Args:
        engine: a key of `ENGINE_SETTINGS`.
        pair: its name, as `load_pair` takes it.

    Raises:
        ValueError: there is no such engine.
    """
    one_of("engine", engine, tuple(ENGINE_SETTINGS))
    return ENGINE_SETTINGS[engine].stop != "never" and resolve(pair).draft != PROMPT_LOOKUP


def engine_arguments(engine: str, pair: str, knobs: Mapping[str, float]) -> str:
    """Return how an engine is told to decode with a setting.

    Args:
        engine: a key of `ENGINE_SETTINGS`.
        pair: its name, as `load_pair` takes it; where the draft is no model and copies no prompt, no engine has it.
        knobs: `draft_length`, and where the engine takes them `stop_threshold` and `min_draft_length`; 0 for those left
            out.

    Returns:
        A line or several, which name the pair's models as `pair` does.

    Raises:
        ValueError: there is no such engine, or the pair has no draft.
    """
    one_of("engine", engine, tuple(ENGINE_SETTINGS))
    preset = resolve(pair)
    if preset.draft is None:
        raise ArgumentError(f"the pair {pair} has no draft; give target+draft")
    if not knobs["draft_length"]:
        return NO_DRAFT
    if not (preset.draft_is_model or preset.draft == PROMPT_LOOKUP):
        return (
            f"{engine} drafts from no {preset.draft} table; with specgym: "
            f"SpeculativeDecoder(load_pair({pair!r})).generate(prompt, knobs={dict(knobs)!r})"
        )
    draft = preset.draft if preset.draft_is_model else None
    return _WRITERS[engine](preset.target, draft, int(knobs["draft_length"]), knobs)


def _transformers(target: str, draft: str | None, length: int, knobs: Mapping[str, float]) -> str:
    if draft is None:
        return f"target.generate(**inputs, prompt_lookup_num_tokens={length})"
    # transformers 5.23.0, generation/candidate_generator.py: AssistedCandidateGenerator reads all three from the
    # generation config of the assistant; as arguments of the target's generate they change nothing.
    threshold = knobs.get("stop_threshold", 0.0)
    return (
        f"draft.generation_config.update(num_assistant_tokens={length}, num_assistant_tokens_schedule='constant', "
        f"assistant_confidence_threshold={threshold:g})\n"
        "target.generate(**inputs, assistant_model=draft)"
    )


def _llama_cpp(target: str, draft: str | None, length: int, knobs: Mapping[str, float]) -> str:
    # `llama-server --help` since the option --spec-type, whose default is none; before, the names were --draft-max,
    # --draft-min and --draft-p-min.
    if draft is None:
        return f"llama-server -m {target}.gguf --spec-type ngram-simple --spec-ngram-simple-size-m {length}"
    return (
        f"llama-server -m {target}.gguf -md {draft}.gguf --spec-type draft-simple --spec-draft-n-max {length} "
        f"--spec-draft-n-min {int(knobs.get('min_draft_length', 0))} "
        f"--spec-draft-p-min {knobs.get('stop_threshold', 0.0):g}"
    )


def _openvino(target: str, draft: str | None, length: int, knobs: Mapping[str, float]) -> str:
    # openvinotoolkit/openvino.genai, samples/python/text_generation: speculative_decoding_lm.py and
    # prompt_lookup_decoding_lm.py.
    if draft is None:
        pipeline = f"openvino_genai.LLMPipeline({target!r}, device, prompt_lookup=True)"
        return f"{pipeline}.generate(prompt, num_assistant_tokens={length}, max_ngram_size=3)"
    model = f"openvino_genai.draft_model({draft!r}, device)"
    return (
        f"openvino_genai.LLMPipeline({target!r}, device, draft_model={model})"
        f".generate(prompt, num_assistant_tokens={length})"
    )


def _vllm(target: str, draft: str | None, length: int, knobs: Mapping[str, float]) -> str:
    # vllm-project/vllm, docs/features/speculative_decoding/draft_model.md and n_gram.md.
    source = {"method": "ngram", "prompt_lookup_max": 4} if draft is None else {"method": "draft_model", "model": draft}
    return f"vllm serve {target} --speculative-config '{json.dumps({**source, 'num_speculative_tokens': length})}'"


_WRITERS: Final[Mapping[str, Callable[[str, str | None, int, Mapping[str, float]], str]]] = {
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
    "openvino": _openvino,
    "vllm": _vllm,
}
