"""OpenVINO GenAI as an engine: what its pipelines are asked for, and what their counters mean."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specgym.decoding import (
    LOOKUP,
    ArgumentError,
    EngineOptions,
    EngineText,
    KnobError,
    SettingIgnoredError,
    open_engine,
)
from specgym.decoding.engines.openvino import OpenVINO

ROUNDS: Mapping[str, Sequence[int]] = {
    "plain": [1] * 30,
    "none": [1, 6, 6, 6, 6, 5],
    "2": [1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2],
    "8": [1, 9, 9, 9, 2],
    "threshold": [1, *[2] * 14, 1],
    "lookup": [1, 1, 1, 1, 3, 1, 1, 1, 4, 4, 4, 2, 1, 1, 4, 4, 3, 1, 2],
}
"""Tokens of every pass of openvino-genai 2026.4.1: SmolLM2-135M-Instruct in float32 with itself as draft, 30 tokens of
a text whose end was ignored; the last with prompt lookup of 3 tokens, 40 tokens of code."""
COUNTED = {"none": (20, 20), "2": (18, 18), "8": (24, 24), "threshold": (14, 14)}
"""Its counters of drafted and of accepted tokens, for the same texts."""


class Pipeline:
    """A pipeline that answers with recorded rounds, and refuses what the real one refuses.

    Attributes:
        built: arguments of all that were built.
        asked: settings of all requests.
        fail: let the next request fail.
    """

    built: list[tuple[str, Mapping[str, Any]]] = []  # noqa: RUF012  # a record across instances
    asked: list[SimpleNamespace] = []  # noqa: RUF012
    fail = False

    def __init__(self, path: str, device: str, **properties: Any) -> None:
        assert device == "CPU"
        self.properties = properties
        Pipeline.built.append((path, properties))
        if properties.get("enable_save_ov_model"):
            if "float32" in path:
                raise RuntimeError("Exception from building_blocks.cpp:716:\nUnsupported quantization type\n\n")
            for name in ("openvino_model", "openvino_tokenizer", "openvino_detokenizer"):
                Path(path).with_name(f"{name}.xml").write_text("<net/>")

    def generate(self, ids: np.ndarray, config: SimpleNamespace) -> SimpleNamespace:
        Pipeline.asked.append(config)
        if Pipeline.fail:
            Pipeline.fail = False
            raise RuntimeError("Check 'content_length <= prompt_ids.size() + m_generated_ids.size()' failed")
        length = getattr(config, "num_assistant_tokens", 0)
        if self.properties.get("prompt_lookup"):
            if not (length and getattr(config, "max_ngram_size", 0)):
                raise RuntimeError("`max_ngram_size` && `num_assistant_tokens` should be specified")
            case = "lookup"
        elif "draft_model" in self.properties:
            threshold = getattr(config, "assistant_confidence_threshold", 0.0)
            if threshold and length:
                raise RuntimeError("Parameters are mutually exclusive in `GenerationConfig`")
            case = "threshold" if threshold else str(length or "none")
        else:
            case = "plain"
        rounds = ROUNDS[case]
        raw = SimpleNamespace(
            m_new_token_times=[5000.0 + 20 * pass_ for pass_ in range(len(rounds))], m_batch_sizes=rounds
        )
        counted = None
        if case in COUNTED:
            drafted, accepted = COUNTED[case]
            counted = SimpleNamespace(get_num_draft_tokens=lambda: drafted, get_num_accepted_tokens=lambda: accepted)
        return SimpleNamespace(
            tokens=[list(range(sum(rounds)))],
            perf_metrics=SimpleNamespace(raw_metrics=raw, get_ttft=lambda: SimpleNamespace(mean=40.0)),
            extended_perf_metrics=counted,
        )


class Tokens(np.ndarray):
    """Token ids with the size as openvino tells it."""

    def get_size(self) -> int:
        return self.size


class Tokenizer:
    """A tokenizer with a token for every character."""

    def __init__(self, path: str) -> None:
        self.path = path

    def encode(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=tensor(np.array([[*map(ord, text)]], np.int64)))

    def get_vocab(self) -> dict[bytes, int]:
        return {b"a": 1, b"b": 2} if Path(self.path).name == "other" else {b"a": 2, b"b": 1}

    def decode(self, tokens: Sequence[int]) -> str:
        return f"{len(tokens)} tokens"


def tensor(array: np.ndarray) -> Tokens:
    return array.view(Tokens)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The worker's module, with a recorded OpenVINO GenAI."""
    engine, genai = ModuleType("openvino"), ModuleType("openvino_genai")
    monkeypatch.setattr(engine, "Tensor", tensor, raising=False)
    for name, value in {
        "LLMPipeline": Pipeline,
        "Tokenizer": Tokenizer,
        "GenerationConfig": SimpleNamespace,
        "draft_model": lambda path, device, **properties: (path, device, properties),
        "get_version": lambda: "2026.4.1.0-3408-ab01d1771e4",
    }.items():
        monkeypatch.setattr(genai, name, value, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", engine)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setattr(Pipeline, "built", [])
    monkeypatch.setattr(Pipeline, "asked", [])
    name = "specgym.decoding.engines.workers.openvino_worker"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    yield module.Worker()
    sys.modules.pop(name)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the IR of a target and a draft, and with GGUF files of both."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        for file in ("openvino_model", "openvino_tokenizer", "openvino_detokenizer"):
            (tmp_path / name / f"{file}.xml").write_text("<net/>")
        (tmp_path / f"{name}.gguf").write_text(f"GGUF of the {name}")
    return tmp_path


class Recorded(OpenVINO):
    """The adaptor, whose requests go to a worker in this process."""

    recorded: Any

    def version(self) -> str:
        return "2026.4.1.0"

    @property
    def worker(self) -> Any:
        return SimpleNamespace(ask=lambda do, **arguments: getattr(self.recorded, do)(**arguments))


def opened(worker: Any, target: Path, draft: Path | str | None, **options: Any) -> Recorded:
    engine = Recorded(str(target), None if draft is None else str(draft), EngineOptions(**options))
    worker.load(**engine.models())
    engine.recorded = worker
    return engine


@pytest.mark.parametrize(("length", "by_place"), [(2, [9, 9]), (8, [3] * 8)])
def test_counters_are_those_of_all_rounds_but_the_last(
    worker: Any, models: Path, length: int, by_place: list[int]
) -> None:
    engine = opened(worker, models / "target", models / "draft")
    text = engine.serve(engine.setting(length)).generate("text", 30)
    assert (text.drafted, text.accepted) == COUNTED[str(length)]
    assert text.accepted_by_place == by_place
    assert text.rounds == len(ROUNDS[str(length)]) - 1
    assert (text.first_tokens, text.timed_tokens, text.new_tokens) == (1, 29, 30)
    assert text.seconds == pytest.approx(0.02 * text.rounds)
    assert text.prompt_seconds == 0.04
    engine.check_effect(engine.setting(length), [text])


def test_a_length_that_is_not_set_would_draft_five(worker: Any, models: Path) -> None:
    """So a length of 0 goes to the pipeline without a draft, and an unset one would be noticed."""
    engine = opened(worker, models / "target", models / "draft")
    assert engine.defaults == {"num_assistant_tokens": 5.0}
    unset = EngineText(**worker.generate("text", {}, 30, 0.0, 0))
    engine.check_effect({"num_assistant_tokens": 5.0}, [unset])
    with pytest.raises(SettingIgnoredError, match="it drafted 20 tokens in 5 rounds"):
        engine.check_effect({"num_assistant_tokens": 2.0}, [unset])
    for knobs in ({"num_assistant_tokens": 0}, None):
        text = engine.serve(knobs).generate("text", 30)
        assert text.drafted is None
        assert not hasattr(Pipeline.asked[-1], "num_assistant_tokens")
    assert [list(properties) for _, properties in Pipeline.built] == [[], ["draft_model"]]


def test_a_threshold_would_draft_one_token_and_is_no_knob(worker: Any, models: Path) -> None:
    engine = opened(worker, models / "target", models / "draft")
    text = EngineText(**worker.generate("text", {"assistant_confidence_threshold": 0.4}, 30, 0.0, 0))
    assert text.accepted_by_place == [14]
    with pytest.raises(SettingIgnoredError, match="it drafted 14 tokens in 15 rounds"):
        engine.check_effect({"num_assistant_tokens": 5.0}, [text])
    with pytest.raises(KnobError, match="openvino has no knob 'assistant_confidence_threshold'"):
        engine.serve({"assistant_confidence_threshold": 0.4})
    with pytest.raises(ArgumentError, match="ends no drafts"):
        engine.setting(4, 0.4)


def test_lookup_is_asked_with_both_of_its_settings_and_tells_no_drafted_tokens(worker: Any, models: Path) -> None:
    engine = opened(worker, models / "target", LOOKUP)
    text = engine.serve({"num_assistant_tokens": 3}).generate("text", 40)
    assert (Pipeline.asked[-1].num_assistant_tokens, Pipeline.asked[-1].max_ngram_size) == (3, 3)
    assert (text.drafted, text.accepted, text.rounds) == (None, 21, 18)
    engine.check_effect(engine.setting(3), [text])
    with pytest.raises(RuntimeError, match="should be specified"):
        worker.generate("text", {"num_assistant_tokens": 3}, 40, 0.0, 0)


def test_sampling_is_lossless_without_a_draft_model_alone(worker: Any, models: Path) -> None:
    lossless = [Recorded(str(models / "target"), draft).lossless_when_sampling for draft in (None, LOOKUP)]
    assert lossless == [True, True]
    engine = opened(worker, models / "target", models / "draft")
    assert not engine.lossless_when_sampling
    engine.serve(None).generate("text", 30, temperature=0.7, seed=4)
    asked = Pipeline.asked[-1]
    assert (asked.do_sample, asked.temperature, asked.rng_seed) == (True, 0.7, 4)
    engine.serve(None).generate("text", 30)
    assert not Pipeline.asked[-1].do_sample


def test_a_pipeline_that_has_failed_is_made_anew_as_it_would_draft_no_more(worker: Any, models: Path) -> None:
    engine = opened(worker, models / "target", models / "draft")
    served = engine.serve({"num_assistant_tokens": 2})
    Pipeline.fail = True
    with pytest.raises(RuntimeError, match=r"content_length.*sampled with a draft fail so.*decode greedily"):
        served.generate("text", 30, temperature=1.0)
    before = len(Pipeline.built)
    served.generate("text", 30)
    assert len(Pipeline.built) == before + 1
    assert "draft_model" in Pipeline.built[-1][1]


def test_a_setting_is_served_after_a_text_that_is_not_timed(worker: Any, models: Path) -> None:
    engine = opened(worker, models / "target", models / "draft")
    engine.serve({"num_assistant_tokens": 8})
    assert [(asked.num_assistant_tokens, asked.max_new_tokens) for asked in Pipeline.asked] == [(8, 12)]
    engine.serve(None)
    assert len(Pipeline.asked) == 1


def test_ids_are_read_as_they_are_and_an_empty_prompt_is_refused(worker: Any, models: Path) -> None:
    engine = opened(worker, models / "target", None)
    assert engine.serve(None).generate([5, 6], 30).text == "30 tokens"
    assert worker.generate("", None, 30, 0.0, 0) == {"refused": "the prompt has no tokens"}


def test_arithmetic_and_threads_are_the_plugins_unless_set(worker: Any, models: Path) -> None:
    opened(worker, models / "target", models / "draft")
    assert Pipeline.built[-1][1] == {}
    engine = opened(worker, models / "target", models / "draft", float32=True, threads=2)
    engine.serve({"num_assistant_tokens": 2})
    float32 = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": 2,
    }
    path, properties = Pipeline.built[-1]
    assert path == str(models / "target")
    assert properties == {**float32, "draft_model": (str(models / "draft"), "CPU", float32)}


def test_ir_is_made_of_gguf_once_the_drafts_too(
    worker: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        opened(worker, models / "target.gguf", models / "draft.gguf").serve({"num_assistant_tokens": 2})
    converted = [path for path, properties in Pipeline.built if properties.get("enable_save_ov_model")]
    assert [Path(path).name for path in converted] == ["target.gguf", "draft.gguf"]
    kept = sorted((tmp_path / "cache" / "engines" / "openvino").iterdir())
    assert [folder.name.split("-")[0] for folder in kept] == ["draft", "target"]
    assert {file.name for file in kept[0].iterdir()} == {
        "openvino_model.xml",
        "openvino_tokenizer.xml",
        "openvino_detokenizer.xml",
    }
    assert Pipeline.built[-1][0] == str(kept[1])
    (models / "draft.gguf").write_text("another GGUF of the draft")
    opened(worker, models / "target.gguf", models / "draft.gguf")
    assert len(list(kept[0].parent.iterdir())) == 3


def test_a_draft_with_other_tokens_and_a_file_of_another_type_are_refused(
    worker: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    (models / "draft").rename(models / "other")
    load = Recorded(str(models / "target"), str(models / "other")).models()
    assert "has other tokens than the target" in worker.load(**load)["refused"]
    (models / "draft.gguf").rename(models / "float32.gguf")
    refused = worker.load(**Recorded(str(models / "float32.gguf"), None).models())["refused"]
    assert "(Unsupported quantization type)" in refused
    assert "F16" in refused
    assert not list((tmp_path / "cache" / "engines" / "openvino").iterdir())


def test_models_in_another_format_are_refused_before_anything_starts(models: Path) -> None:
    (models / "target" / "openvino_tokenizer.xml").unlink()
    (models / "model.bin").write_text("")
    for target, draft, reason in (
        ("nowhere", None, "the target nowhere is no file or folder"),
        (models / "target", None, "has no openvino_tokenizer.xml"),
        (models / "draft", models / "model.bin", r"the draft .*model.bin is no folder and no GGUF file"),
    ):
        with pytest.raises(ArgumentError, match=f"{reason}.*optimum-cli export openvino"):
            OpenVINO(str(target), None if draft is None else str(draft))


@pytest.mark.engines
@pytest.mark.skipif("SPECGYM_PYTHON_OPENVINO" not in os.environ, reason="names an interpreter with openvino-genai")
@pytest.mark.parametrize("draft", ["tiny-3m-draft-1l", LOOKUP])
def test_openvino_in_an_interpreter_of_its_own(tmp_path: Path, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from specgym.decoding.engines.gguf import GgufSettings, write_gguf

    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    files = {name: tmp_path / f"{name}.gguf" for name in ("tiny-3m", draft) if name != LOOKUP}
    for name, file in files.items():
        write_gguf(GgufSettings(name, file))
    options = EngineOptions(python=Path(os.environ["SPECGYM_PYTHON_OPENVINO"]), threads=1, float32=True)
    texts: list[Sequence[int] | None] = []
    with open_engine("openvino", str(files["tiny-3m"]), str(files.get(draft, draft)), options) as running:
        for knobs in (None, running.defaults, running.setting(2)):
            text = running.serve(knobs).generate("def add(a, b):\n    return a + b\n\ndef sub(a, b):\n", 32)
            texts.append(text.tokens)
            if knobs is not None:
                assert (text.drafted is None) == (draft == LOOKUP)
                running.check_effect(knobs, [text])
    assert texts[0] == texts[1] == texts[2]
