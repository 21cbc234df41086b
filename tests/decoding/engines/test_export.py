"""Exports: read back by each engine's own means, they are the setting; what an engine lacks is said."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import GenerationConfig

from specgym.decoding import (
    ENGINE_SETTINGS,
    EXPORT_ENGINES,
    LOOKUP,
    ArgumentError,
    Export,
    ServedSetting,
    engine_arguments,
    export_setting,
    setting_of_pair,
    takes_threshold,
)
from specgym.decoding.engines import llama_cpp, vllm
from specgym.decoding.engines.export.setting import NO_DRAFT

SETTING = {"draft_length": 7, "stop_threshold": 0.35, "min_draft_length": 2}
FIXTURE = Path(__file__).parents[2] / "fixtures" / "engines" / "options.json"
RECORDED: Mapping[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
"""Names that each engine takes, with their source."""


def drafted(**more: Any) -> ServedSetting:
    """A setting for a draft model."""
    return ServedSetting("gpt2-xl", "gpt2", 7, **more)


def copied(**more: Any) -> ServedSetting:
    """A setting for drafts copied from the prompt."""
    return ServedSetting("gpt2-xl", LOOKUP, 7, **more)


def options(command: str) -> dict[str, str]:
    """Options of a command line, and their values."""
    words = shlex.split(command)
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("-")}


def names_in(export: Export) -> set[str]:
    """Every name of an option or field that an export sets."""
    names: set[str] = set()
    for name, content in export.files.items():
        stated = yaml.safe_load(content) if name.endswith(".yaml") else json.loads(content)
        names |= set(stated.get("speculative_config", stated))
    if not export.files:
        names |= {option for option in options(export.arguments) if len(option) > 2 or option in ("-m", "-md")}
    return names - {"-m"}  # of python -m too


@pytest.mark.parametrize("engine", RECORDED)
def test_every_name_is_one_that_the_engine_takes(engine: str) -> None:
    written = set[str]()
    for temperature in (0.0, 1.0):
        for setting in (
            drafted(stop_threshold=0.35, min_draft_length=2, temperature=temperature),
            copied(temperature=temperature, schedule={1: 7, 8: 2}),
        ):
            written |= names_in(export_setting(engine, setting))
    assert written
    assert not written - set(RECORDED[engine]["names"])
    assert RECORDED[engine]["version"] == ENGINE_SETTINGS[engine].version


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
    for setting in (drafted(), copied()):
        (stated,) = export_setting("transformers", setting).files.values()
        read = GenerationConfig(**json.loads(stated)).to_dict()
        assert json.loads(stated).items() <= read.items()
        assert set(json.loads(stated)) <= set(GenerationConfig().to_dict())


def test_llama_cpp_is_told_the_kind_of_draft_and_all_knobs() -> None:
    stated = options(engine_arguments("llama.cpp", "gpt2-xl+gpt2", SETTING))
    assert stated["-md"] == "gpt2.gguf"
    assert stated["--spec-type"] == "draft-simple"
    for knob, option in ENGINE_SETTINGS["llama.cpp"].settings.items():
        assert float(stated[option]) == SETTING[knob]
    assert "--spec-draft-sampling" not in stated
    assert options(export_setting("llama.cpp", drafted(temperature=1.0)).arguments)["--spec-draft-sampling"] == (
        "probabilistic"
    )


@pytest.mark.parametrize("name", ["n_max", "draft_n_max", "--spec-draft-n-max"])
def test_a_knob_in_llama_cpp_s_own_terms_is_its_option(name: str) -> None:
    stated = options(export_setting("llama.cpp", drafted(extra={name: 12.0})).arguments)
    assert stated["--spec-draft-n-max"] == "12"


def test_knobs_of_an_engine_that_was_tuned_live_are_its_options() -> None:
    for name, option in llama_cpp._FLAGS.items():
        setting = (copied if "ngram" in option else drafted)(extra={name: 9.0})
        assert options(export_setting("llama.cpp", setting).arguments)[option] == "9"
    for draft in ("gpt2", LOOKUP):
        values = {knob.name: 4.0 for knob in vllm._knobs(draft)}
        stated = export_setting("vllm", ServedSetting("gpt2-xl", draft, 7, extra=values)).files[
            "speculative_config.json"
        ]
        assert values.items() <= json.loads(stated).items()


def test_what_an_engine_was_measured_with_is_not_changed_for_sampling() -> None:
    lengths = {"llama.cpp": "n_max", "vllm": "num_speculative_tokens"}
    for engine, name in lengths.items():
        assert "probabilistic" in export_setting(engine, drafted(temperature=0.7)).arguments
        assert "probabilistic" not in export_setting(engine, drafted(temperature=0.7, extra={name: 7.0})).arguments


def test_vllm_gets_one_object_of_settings() -> None:
    stated = json.loads(options(engine_arguments("vllm", "gpt2-xl+gpt2", SETTING))["--speculative-config"])
    assert stated == {"method": "draft_model", "model": "gpt2", "num_speculative_tokens": 7}
    stated = json.loads(options(engine_arguments("vllm", "gpt2-xl+prompt-lookup", SETTING))["--speculative-config"])
    # prompt_lookup_max alone would set the other end too.
    assert stated == {
        "method": "ngram",
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
        "num_speculative_tokens": 7,
    }


def test_openvino_takes_the_length_when_it_generates_and_warns_of_sampling() -> None:
    for pair, draft in (
        ("gpt2-xl+gpt2", "draft_model('gpt2', device)"),
        ("gpt2-xl+prompt-lookup", "prompt_lookup=True"),
    ):
        stated = engine_arguments("openvino", pair, SETTING)
        assert "num_assistant_tokens=7" in stated
        assert draft in stated
        # Its threshold would draft one token a round, and refuses a length beside it.
        assert "assistant_confidence_threshold" not in stated
    assert any(
        "does not follow the target's" in note for note in export_setting("openvino", drafted(temperature=1)).notes
    )
    assert not export_setting("openvino", drafted()).notes


def test_sglang_verifies_one_token_more_than_it_drafts() -> None:
    stated = options(engine_arguments("sglang", "gpt2-xl+gpt2", SETTING))
    assert stated["--speculative-algorithm"] == "STANDALONE"
    assert (stated["--speculative-num-steps"], stated["--speculative-num-draft-tokens"]) == ("7", "8")
    assert stated["--speculative-eagle-topk"] == "1"
    looked_up = export_setting("sglang", ServedSetting("gpt2-xl", LOOKUP, 20))
    assert int(options(looked_up.arguments)["--speculative-ngram-max-trie-depth"]) > 20
    assert "earlier requests" in " ".join(looked_up.notes)


def test_schedules_by_batch_size_are_written_where_they_exist_and_refused_where_not() -> None:
    schedule = {1: 7, 8: 3, 32: 0}
    stated = json.loads(export_setting("vllm", drafted(schedule=schedule)).files["speculative_config.json"])
    assert stated["num_speculative_tokens_per_batch_size"] == [[1, 1, 7], [2, 8, 3], [9, 32, 0]]
    export = export_setting("tensorrt-llm", drafted(schedule=schedule))
    stated = yaml.safe_load(export.files["speculative.yaml"])["speculative_config"]
    assert stated["draft_len_schedule"] == schedule
    assert stated["max_draft_len"] == 7
    assert "stops drafting" in " ".join(export.notes)
    # The first entry must have max_draft_len, and no other may have more.
    growing = export_setting("tensorrt-llm", drafted(schedule={1: 2, 8: 5}))
    assert yaml.safe_load(growing.files["speculative.yaml"])["speculative_config"]["draft_len_schedule"] == {1: 2, 8: 2}
    assert "cut to 2 tokens" in " ".join(growing.notes)
    assert NO_DRAFT in export_setting("tensorrt-llm", drafted(schedule={1: 0, 8: 5})).arguments
    for engine in ("llama.cpp", "sglang", "transformers", "openvino"):
        assert "by batch size" in " ".join(export_setting(engine, drafted(schedule=schedule)).notes)


@pytest.mark.parametrize("engine", EXPORT_ENGINES)
def test_what_an_engine_lacks_or_understands_otherwise_is_said(engine: str) -> None:
    def said(**more: Any) -> str:
        return " ".join(export_setting(engine, drafted(**more)).notes)

    known = ENGINE_SETTINGS[engine]
    assert ("stop_threshold 0.3 has no equivalent" in said(stop_threshold=0.3)) == (known.stop == "never")
    assert "stop_threshold" not in said()
    if known.stop != "never":
        other = "transformers" if engine == "llama.cpp" else "llama.cpp"
        assert "another rule" in said(stop_threshold=0.3, rule=other)
        assert "another rule" not in said(stop_threshold=0.3, rule=known.stop)
    assert ("min_draft_length 2 has no equivalent" in said(min_draft_length=2)) == (engine != "llama.cpp")
    shipped = export_setting(engine, ServedSetting("tiny-10m", LOOKUP, 3)).notes
    assert any("tiny-10m ships with specgym" in note for note in shipped)


@pytest.mark.parametrize("engine", EXPORT_ENGINES)
def test_every_engine_says_what_to_do_with_every_kind_of_draft(engine: str) -> None:
    assert engine_arguments(engine, "tiny", {"draft_length": 0}) == NO_DRAFT
    assert NO_DRAFT in export_setting(engine, ServedSetting("tiny-10m", "tiny-3m", 0)).script
    verified = 8 if engine == "sglang" else 7  # with the token before the draft
    assert str(verified) in engine_arguments(engine, "tiny-10m-lookup", {"draft_length": 7})
    assert "SpeculativeDecoder(load_pair('tiny-10m-ngram'))" in engine_arguments(engine, "tiny-10m-ngram", SETTING)
    assert not takes_threshold(engine, "tiny-10m-lookup")
    assert takes_threshold(engine, "tiny") == ("stop_threshold" in ENGINE_SETTINGS[engine].settings)
    with pytest.raises(ValueError, match="tiny-10m has no draft; give target"):
        engine_arguments(engine, "tiny-10m", SETTING)
    with pytest.raises(ValueError, match="engine must be"):
        engine_arguments("tgi", "tiny", SETTING)


def test_a_setting_is_checked_and_written_whole(tmp_path: Path) -> None:
    for wrong in ({"draft_length": -1}, {"stop_threshold": 2.0}, {"schedule": {0: 3}}, {"target": ""}):
        values: dict[str, Any] = {"target": "t", "draft": "d", "draft_length": 3, **wrong}
        with pytest.raises(ArgumentError, match=r"must be"):
            ServedSetting(**values)
    with pytest.raises(ArgumentError, match="draft from no ngram table"):
        setting_of_pair("tiny-10m-ngram", SETTING)
    with pytest.raises(ArgumentError, match="draft from no choice among"):
        setting_of_pair("tiny-10m-mixed", SETTING)
    paths = export_setting("tensorrt-llm", drafted(stop_threshold=0.4)).save(tmp_path / "deep")
    script = paths[0].read_text()
    assert script.startswith("# For tensorrt-llm 1.4.0rc4.\n# stop_threshold 0.4 has no equivalent")
    assert [path.name for path in paths] == ["serve.sh", "speculative.yaml"]


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "sglang", "openvino"])
def test_engines_read_their_exports_back(engine: str, tmp_path: Path) -> None:
    python = os.environ.get(f"SPECGYM_PYTHON_{engine.upper().replace('.', '_')}")
    if python is None:
        pytest.skip(f"SPECGYM_PYTHON_{engine.upper().replace('.', '_')} names no interpreter that has {engine}")
    checker = Path(__file__).parents[2] / "helpers" / "engine_readers.py"
    models = _saved_models(tmp_path) if engine == "vllm" else ("gpt2-xl", "gpt2")
    for draft, more in ((models[1], {"schedule": {1: 7, 8: 3}}), (LOOKUP, {}), (models[1], {"temperature": 1.0})):
        export = export_setting(engine, ServedSetting(models[0], draft, 7, **more))
        paths = [str(path) for path in export.save(tmp_path / engine)]
        done = subprocess.run([python, str(checker), engine, *paths], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        read = json.loads(done.stdout.splitlines()[-1])
        assert 7 in read.values() or "7" in read.values(), read


def _saved_models(folder: Path) -> tuple[str, str]:
    """Folders of the shipped target and draft, as other libraries read them."""
    from specgym.decoding import load_model

    for name in ("tiny-10m", "tiny-10m-draft-1l"):
        for part in load_model(name):
            part.save_pretrained(folder / name)
    return str(folder / "tiny-10m"), str(folder / "tiny-10m-draft-1l")
