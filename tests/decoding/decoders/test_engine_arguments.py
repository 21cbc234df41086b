"""Arguments of engines: read back by each engine's own means, they are the setting that was recommended."""

from __future__ import annotations

import itertools
import json
import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from specgym.decoding import ENGINE_SETTINGS, engine_arguments, takes_threshold
from specgym.decoding.decoders.engine_arguments import NO_DRAFT

SETTING = {"draft_length": 7, "stop_threshold": 0.35, "min_draft_length": 2}


def options(command: str) -> dict[str, str]:
    """Options of a command line, and their values."""
    words = shlex.split(command)
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("-")}


def test_transformers_finds_its_settings_where_assisted_generation_reads_them() -> None:
    first, second = engine_arguments("transformers", "gpt2-xl+gpt2", SETTING).splitlines()
    draft = SimpleNamespace(generation_config=GenerationConfig())
    calls: list[dict[str, Any]] = []
    target = SimpleNamespace(generate=lambda **arguments: calls.append(arguments))
    for line in (first, second):
        exec(line, {"draft": draft, "target": target, "inputs": {}})
    config = draft.generation_config
    assert config.num_assistant_tokens == 7
    assert config.assistant_confidence_threshold == 0.35
    assert config.num_assistant_tokens_schedule == "constant"
    assert calls == [{"assistant_model": draft}]


def test_llama_cpp_is_told_the_kind_of_draft_and_all_knobs() -> None:
    stated = options(engine_arguments("llama.cpp", "gpt2-xl+gpt2", SETTING))
    assert stated["-md"] == "gpt2.gguf"
    assert stated["--spec-type"] == "draft-simple"
    for knob, option in ENGINE_SETTINGS["llama.cpp"].settings.items():
        assert float(stated[option]) == SETTING[knob]


def test_vllm_gets_one_object_of_settings() -> None:
    stated = json.loads(options(engine_arguments("vllm", "gpt2-xl+gpt2", SETTING))["--speculative-config"])
    assert stated == {"method": "draft_model", "model": "gpt2", "num_speculative_tokens": 7}
    stated = json.loads(options(engine_arguments("vllm", "gpt2-xl+prompt-lookup", SETTING))["--speculative-config"])
    assert stated["method"] == "ngram"


def test_openvino_takes_the_length_when_it_generates() -> None:
    for pair, draft in (
        ("gpt2-xl+gpt2", "draft_model('gpt2', device)"),
        ("gpt2-xl+prompt-lookup", "prompt_lookup=True"),
    ):
        stated = engine_arguments("openvino", pair, SETTING)
        assert "num_assistant_tokens=7" in stated
        assert draft in stated


@pytest.mark.parametrize("engine", ENGINE_SETTINGS)
def test_every_engine_says_what_to_do_with_every_kind_of_draft(engine: str) -> None:
    assert engine_arguments(engine, "tiny", {"draft_length": 0}) == NO_DRAFT
    assert "7" in engine_arguments(engine, "tiny-10m-lookup", {"draft_length": 7})
    assert "SpeculativeDecoder(load_pair('tiny-10m-ngram'))" in engine_arguments(engine, "tiny-10m-ngram", SETTING)
    assert not takes_threshold(engine, "tiny-10m-lookup")
    assert takes_threshold(engine, "tiny") == ("stop_threshold" in ENGINE_SETTINGS[engine].settings)
    with pytest.raises(ValueError, match="tiny-10m has no draft; give target"):
        engine_arguments(engine, "tiny-10m", SETTING)
    with pytest.raises(ValueError, match="engine must be"):
        engine_arguments("tgi", "tiny", SETTING)
