"""Arguments that make an engine decode exactly with a setting of ours: lines of Python or of a shell, and files.

Each engine takes them in a place of its own, and some ignore without a word what stands elsewhere; the comments say
where that is known from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from ...decoders.traits import ENGINE_SETTINGS
from ...errors import ArgumentError, one_of
from ...loading.presets import NGRAM, PROMPT_LOOKUP, PairPreset, resolve
from ..engine import LOOKUP
from .servers import llama_cpp, sglang, tensorrt_llm, vllm
from .setting import LONGEST_MATCH, NO_DRAFT, Export, ServedSetting, notes_on

EXPORT_ENGINES: Final = tuple(ENGINE_SETTINGS)
"""Engines that settings can be written for."""


def export_setting(engine: str, setting: ServedSetting) -> Export:
    """Write a setting as an engine takes it.

    Args:
        engine: one of `EXPORT_ENGINES`.
        setting: to be written.

    Raises:
        ArgumentError: there is no such engine.
    """
    one_of("engine", engine, EXPORT_ENGINES)
    if not setting.speculates:
        return Export(engine, ENGINE_SETTINGS[engine].version, f"# {NO_DRAFT}")
    return _WRITERS[engine](setting)


def takes_threshold(engine: str, pair: str) -> bool:
    """Return whether an engine ends the drafts of a pair early, by a threshold.

    Prompt lookup copies a fixed number of tokens in every engine.

    Args:
        engine: a key of `ENGINE_SETTINGS`.
        pair: its name, as `load_pair` takes it.

    Raises:
        ValueError: there is no such engine.
    """
    one_of("engine", engine, EXPORT_ENGINES)
    return ENGINE_SETTINGS[engine].stop != "never" and resolve(pair).draft != PROMPT_LOOKUP


def setting_of_pair(pair: str, knobs: Mapping[str, float], **more: Any) -> ServedSetting:
    """Return a setting of a pair of ours.

    Args:
        pair: its name, as `load_pair` takes it.
        knobs: `draft_length`, and where there are any `stop_threshold` and `min_draft_length`.
        more: further arguments of `ServedSetting`.

    Raises:
        ArgumentError: the pair has no draft, or one that no engine has.
    """
    preset = resolve(pair)
    if preset.draft is None:
        raise ArgumentError(f"the pair {pair} has no draft; give target+draft")
    if not (preset.draft_is_model or preset.draft == PROMPT_LOOKUP):
        raise ArgumentError(f"engines draft from no {_lacking(preset)}; {_ours(pair, knobs)}")
    return ServedSetting(
        preset.target,
        preset.draft if preset.draft_is_model else LOOKUP,
        int(knobs["draft_length"]),
        float(knobs.get("stop_threshold", 0.0)),
        int(knobs.get("min_draft_length", 0)),
        **more,
    )


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
    one_of("engine", engine, EXPORT_ENGINES)
    preset = resolve(pair)
    if preset.draft is None:
        raise ArgumentError(f"the pair {pair} has no draft; give target+draft")
    if not knobs["draft_length"]:
        return NO_DRAFT
    if not (preset.draft_is_model or preset.draft == PROMPT_LOOKUP):
        return f"{engine} drafts from no {_lacking(preset)}; {_ours(pair, knobs)}"
    return export_setting(engine, setting_of_pair(pair, knobs)).arguments


def _lacking(preset: PairPreset) -> str:
    if len(preset.drafts) > 1:
        return f"choice among {preset.draft}"
    is_table = preset.draft == NGRAM or preset.drafts[0].endswith(".safetensors")
    return f"{preset.draft} table" if is_table else preset.drafts[0]


def _ours(pair: str, knobs: Mapping[str, float]) -> str:
    return f"with specgym: SpeculativeDecoder(load_pair({pair!r})).generate(prompt, knobs={dict(knobs)!r})"


def _transformers(setting: ServedSetting) -> Export:
    if setting.draft == LOOKUP:
        copied = {
            "prompt_lookup_num_tokens": setting.draft_length,
            "max_matching_ngram_size": LONGEST_MATCH,
            **setting.whole_extra,
        }
        lines = [f"target.generate(**inputs, {_keywords(copied)})"]
        return _library("transformers", setting, lines, {"generation_config.json": copied})
    # transformers 5.23.0, generation/candidate_generator.py: AssistedCandidateGenerator reads all three from the
    # generation config of the assistant; as arguments of the target's generate they change nothing.
    config: dict[str, object] = {
        "num_assistant_tokens": setting.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": setting.stop_threshold,
        **setting.whole_extra,
    }
    lines = [
        f"draft.generation_config.update({_keywords(config)})",
        "target.generate(**inputs, assistant_model=draft)",
    ]
    note = (
        "generate divides the draft's scores by the temperature twice: the text is exact, but other tokens are "
        "accepted than specgym measured."
        if setting.draws_drafts
        else ""
    )
    return _library("transformers", setting, lines, {"draft_generation_config.json": config}, note)


def _openvino(setting: ServedSetting) -> Export:
    # openvinotoolkit/openvino.genai, samples/python/text_generation: speculative_decoding_lm.py and
    # prompt_lookup_decoding_lm.py. Look-up has no default of either number.
    config: dict[str, object] = {"num_assistant_tokens": setting.draft_length}
    if setting.draft == LOOKUP:
        config["max_ngram_size"] = LONGEST_MATCH
    config |= setting.whole_extra
    drafted = (
        "prompt_lookup=True"
        if setting.draft == LOOKUP
        else f"draft_model=openvino_genai.draft_model({setting.draft!r}, device)"
    )
    lines = [
        f"pipeline = openvino_genai.LLMPipeline({setting.target!r}, device, {drafted})",
        f"pipeline.generate(prompt, {_keywords(config)})",
    ]
    note = (
        "WARNING: sampled text does not follow the target's distribution when this pipeline drafts (2026.4.1); decode "
        "greedily, or without a draft."
        if setting.temperature
        else ""
    )
    return _library("openvino", setting, lines, {"generation_config.json": config}, note)


def _library(
    engine: str, setting: ServedSetting, lines: list[str], files: Mapping[str, Mapping[str, object]], *notes: str
) -> Export:
    return Export(
        engine,
        ENGINE_SETTINGS[engine].version,
        "\n".join(lines),
        {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()},
        notes_on(engine, setting, *notes),
    )


def _keywords(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


_WRITERS: Final[Mapping[str, Callable[[ServedSetting], Export]]] = {
    "transformers": _transformers,
    "llama.cpp": llama_cpp,
    "openvino": _openvino,
    "vllm": vllm,
    "sglang": sglang,
    "tensorrt-llm": tensorrt_llm,
}
