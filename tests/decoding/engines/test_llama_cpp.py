"""llama.cpp: its options, counts and faults with a server without a model, and its behaviour with a real one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.engines import llama_cpp
from specgym.decoding.engines.engine import (
    LOOKUP,
    Engine,
    EngineError,
    EngineOptions,
    SettingIgnoredError,
    open_engine,
)
from specgym.decoding.engines.gguf import GgufSettings, write_gguf, write_model
from specgym.decoding.engines.gguf_header import read_header
from specgym.decoding.engines.llama_cpp import LlamaCpp, require_same_vocabulary
from specgym.decoding.engines.process import EngineProcess, free_port
from specgym.decoding.engines.workers import llama_server
from specgym.decoding.errors import ArgumentError, KnobError, VocabularyMismatchError
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers import fake_llama_server

PROMPTS = (
    "Once upon a time there was a little",
    "def f(x):\n    return",
    "The king of the country said",
    "1 2 3 4 1 2",
)


def vocabulary_file(path: Path, tokens: list[str], eos: int = 0, file_type: int = 1) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A target and a draft that have a vocabulary and no weights."""
    tokens = [f"t{number}" for number in range(300)]
    return tuple(str(vocabulary_file(tmp_path / name, tokens)) for name in ("target.gguf", "draft.gguf"))  # type: ignore[return-value]


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """Options that run the server without a model."""
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{fake_llama_server.__file__}" "$@"\n')
    program.chmod(0o755)
    return EngineOptions(program=program, threads=2, context=256)


@pytest.fixture
def engine(files: tuple[str, str], options: EngineOptions) -> Iterator[Engine]:
    with open_engine("llama.cpp", *files, options) as opened:
        yield opened


def test_a_draft_is_switched_on_and_a_plain_server_has_none(files: tuple[str, str], options: EngineOptions) -> None:
    engine = LlamaCpp(*files, options)
    plain = engine.arguments(None, 8080)
    assert not [word for word in plain if word.startswith("--spec")]
    short = LlamaCpp(*files, replace(options, context=10)).arguments(None, 8080)
    assert short == plain  # with a context of 256
    drafting = engine.arguments(engine.resolve_knobs({"p_min": 0.25}), 8080)
    assert drafting[: len(plain)] == plain
    assert " ".join(drafting[len(plain) :]) == (
        f"--spec-type draft-simple --spec-draft-model {files[1]} --spec-draft-threads 2 "
        "--spec-draft-n-max 3 --spec-draft-n-min 0 --spec-draft-p-min 0.25"
    )
    lookup = LlamaCpp(files[0], LOOKUP, options)
    assert " ".join(lookup.arguments(lookup.defaults, 8080)[len(plain) :]) == (
        "--spec-type ngram-simple --spec-ngram-simple-size-m 48 --spec-ngram-simple-size-n 12"
    )


def test_the_launcher_of_xllamacpp_takes_the_same_options(
    files: tuple[str, str], options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holder(**more: object) -> SimpleNamespace:
        return SimpleNamespace(cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace(), **more)

    def parameters() -> SimpleNamespace:
        draft = holder(mparams=SimpleNamespace())
        return holder(
            model=SimpleNamespace(), speculative=SimpleNamespace(draft=draft, ngram_simple=SimpleNamespace(), types=[])
        )

    def serve(read: SimpleNamespace) -> SimpleNamespace:
        served.append(read)
        return SimpleNamespace(listening_address="here")

    served: list[SimpleNamespace] = []
    kinds = SimpleNamespace(COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE=1, COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE=2)
    library = SimpleNamespace(CommonParams=parameters, Server=serve, common_speculative_type=kinds)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2026.10.11549")
    monkeypatch.setattr("threading.Event.wait", lambda self: True)
    for draft in (files[1], LOOKUP):
        engine = LlamaCpp(files[0], draft, options)
        llama_server.main(engine.arguments(engine.defaults, 8080))
        llama_server.main(engine.arguments(None, 8080))
    first, plain, lookup, _ = served
    assert vars(first.speculative.draft) == {
        "cpuparams": SimpleNamespace(n_threads=2),
        "cpuparams_batch": SimpleNamespace(n_threads=2),
        "mparams": SimpleNamespace(path=files[1]),
        "n_max": 3,
        "n_min": 0,
        "p_min": 0.0,
    }
    assert (first.speculative.types, plain.speculative.types, lookup.speculative.types) == ([1], [], [2])
    assert vars(lookup.speculative.ngram_simple) == {"size_n": 12, "size_m": 48}
    assert (first.model.path, first.port, first.n_ctx, first.n_parallel, first.cache_ram_mib) == (
        files[0],
        8080,
        256,
        1,
        0,
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit, match="-m pip install xllamacpp"):
        llama_server.main(["--version"])


def test_counts_are_the_servers_and_absent_ones_are_none_drafted(engine: Engine) -> None:
    setting = engine.resolve_knobs({"n_max": 4})
    with engine.serve(setting) as served:
        text = served.generate([5, 6, 7], 30, temperature=0.5, seed=3)
        assert (text.new_tokens, text.drafted, text.accepted, text.rounds) == (30, 37, 18, 11)
        assert text.accepted_by_place == [9, 9, 0, 0]
        assert (text.seconds, text.prompt_seconds) == (20.0 * 29 / 1000, 0.0125)
        second = served.generate("again", 30)
        assert second.accepted_by_place == text.accepted_by_place  # of this text alone
        engine.check_effect(setting, [text, second])
    with engine.serve(None) as plain:
        text = plain.generate("once", 20)
        assert (text.drafted, text.accepted, text.rounds, text.accepted_by_place) == (0, 0, 19, None)
        with pytest.raises(ArgumentError, match=r"256 tokens of context; raise it .*context of EngineOptions"):
            plain.generate("once", 300)
    assert engine.version() == "b11549"
    assert not engine.remembers


def test_a_length_of_none_is_plain_decoding(engine: Engine) -> None:
    with engine.serve({"n_max": 0, "n_min": 2}) as served:
        assert served.generate("once", 20).drafted == 0


@pytest.mark.parametrize("knobs", [{"n_max": 3}, {"n_max": 8, "n_min": 2}, {"n_max": 8, "p_min": 0.5}])
def test_a_setting_that_is_ignored_is_noticed_and_one_with_few_drafts_is_not(
    engine: Engine, knobs: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA", "ignores")
    setting = engine.resolve_knobs(knobs)
    with engine.serve(setting) as served:
        texts = [served.generate("once", 30)]
        if len(knobs) > 1:  # drafts may well be all dropped, or all end at once
            engine.check_effect(setting, texts)
            return
        with pytest.raises(SettingIgnoredError, match=r"b11549 did not follow n_max=3, .*: it drafted 0 tokens in 29"):
            engine.check_effect(setting, texts)


def test_a_minimum_above_the_length_is_refused(engine: Engine) -> None:
    with pytest.raises(KnobError, match=r"n_min is 4 and n_max 3: .* drop every draft"):
        engine.serve({"n_min": 4})
    assert engine.nearest({"n_max": 3, "n_min": 4, "p_min": 0.5}) == {"n_max": 3, "n_min": 3, "p_min": 0.5}


def test_a_server_that_dies_says_why(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LLAMA", "dies")
    with pytest.raises(EngineError, match=r"(?s)exit code 1.*invalid argument: --spec-type"):
        engine.serve({})
    monkeypatch.setenv("FAKE_LLAMA", "breaks")
    with engine.serve({}) as served, pytest.raises(EngineError, match=r"(?s)SIGABRT.*GGML_ASSERT\(n_tokens > 0\)"):
        served.generate("once", 30)


def test_a_vocabulary_that_llama_cpp_would_not_draft_for_is_refused(tmp_path: Path) -> None:
    tokens = [f"t{number}" for number in range(1000)]
    target = read_header(vocabulary_file(tmp_path / "target.gguf", tokens))
    for number, (others, eos, message) in enumerate(
        [
            (tokens[:800], 0, "target.gguf has 1000 tokens and draft .* has 800: llama.cpp would serve without"),
            ([*tokens[:500], "other", *tokens[501:]], 0, "token 500 is 't500' and 'other'"),
            (tokens, 2, r"differ in eos_token_id \(0, 2\)"),
        ]
    ):
        draft = vocabulary_file(tmp_path / f"draft{number}.gguf", others, eos)
        with pytest.raises(VocabularyMismatchError, match=message):
            LlamaCpp(str(target.path), str(draft))
    padded = vocabulary_file(tmp_path / "padded.gguf", ["<s>", *tokens[1:], *["pad"] * 128])
    require_same_vocabulary(target, read_header(padded))


def test_files_that_are_no_models_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in (
        (None, "cannot be read: No such file"),
        (b"PK", "is no GGUF file"),
        (b"GGUF\x03\0\0\0", "is damaged or was cut off"),
        (b"GGUF\x09\0\0\0" + bytes(16), "is a GGUF file of version 9"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ArgumentError, match=f"model.gguf {message}"):
            LlamaCpp(str(path), None)


def test_float32_is_a_matter_of_the_file(files: tuple[str, str], options: EngineOptions, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"target.gguf is not in float32, and llama.cpp .* --type f32, or leave"):
        LlamaCpp(*files, replace(options, float32=True))
    path = vocabulary_file(tmp_path / "float32.gguf", ["a"], file_type=gguf.LlamaFileType.ALL_F32)
    LlamaCpp(str(path), None, replace(options, float32=True))


def test_llama_cpp_that_is_missing_says_how_to_get_it(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install xllamacpp, for this Python or"):
        LlamaCpp(*files)
    with pytest.raises(EngineError, match=r"nowhere.*pip install xllamacpp"):
        LlamaCpp(*files, EngineOptions(python=tmp_path / "nowhere"))


@pytest.mark.parametrize("behaviour", ["", "honours"])
def test_a_running_server_is_asked_and_not_believed(
    files: tuple[str, str], options: EngineOptions, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA", behaviour)
    monkeypatch.setenv("FAKE_LLAMA_BUILD", "9093" if behaviour else "11549")
    started = LlamaCpp(*files, options)
    port = free_port()
    command = [str(options.program), *started.arguments(started.defaults, port)]
    with EngineProcess("toy", command) as process:
        address = f"http://127.0.0.1:{port}"
        process.wait_until(lambda: llama_cpp.HttpClient("toy", address, process).answers("/health"), 60)
        engine = LlamaCpp("theirs", "their draft", EngineOptions(address=address))
        assert engine.remembers == bool(behaviour)
        with engine.serve({"n_max": 3}) as served:  # its own setting
            assert served.generate("once", 30).drafted
        if behaviour:
            with engine.serve({"n_max": 8, "p_min": 0.5}) as served:
                assert served.generate("once", 30).accepted
            assert engine.serve(None).generate("once", 30).drafted == 0
        else:
            for setting in ({"n_max": 8}, {"n_max": 3, "p_min": 0.5}, None):
                with pytest.raises(SettingIgnoredError):
                    engine.serve(setting)
        with pytest.raises(EngineError, match="takes no setting of n-grams in a request; start one"):
            LlamaCpp("theirs", LOOKUP, EngineOptions(address=address)).serve({})
        engine.close()
        process.check()


# With the real engine: SPECGYM_PYTHON_LLAMA_CPP=... pytest -n0 -m engines


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    paths = {name: folder / f"{name}.gguf" for name in ("tiny-10m", "tiny-10m-draft-1l")}
    for name, path in paths.items():
        write_gguf(GgufSettings(name, path, None if name == "tiny-10m" else paths["tiny-10m"], "f32"))
    return paths


def real_options() -> EngineOptions:
    python = os.environ.get("SPECGYM_PYTHON_LLAMA_CPP")
    if python is None:
        pytest.skip("SPECGYM_PYTHON_LLAMA_CPP names no interpreter that has xllamacpp")
    return EngineOptions(python=Path(python), threads=1, context=1024)


@pytest.mark.engines
def test_llama_cpp_generates_our_tokens_and_accepts_drafts(exported: dict[str, Path]) -> None:
    model, tokenizer = load_model("tiny-10m")
    ours = AutoregressiveDecoder(Pair(model, None, tokenizer))
    with LlamaCpp(str(exported["tiny-10m"]), str(exported["tiny-10m-draft-1l"]), real_options()) as engine:
        served = {length: engine.serve({"n_max": length}) for length in (0, 3, 8)}
        for prompt in PROMPTS:
            expected = ours.generate(prompt, max_new_tokens=60, sampling=Sampling(temperature=0.0)).tokens
            for length, serving in served.items():
                text = serving.generate(prompt, 60)
                assert list(text.tokens or ()) == list(expected)
                assert serving.generate(tokenizer(prompt)["input_ids"], 60).tokens == text.tokens
                assert bool(text.accepted) == (length > 0)
                engine.check_effect(engine.resolve_knobs({"n_max": length}), [text])


@pytest.mark.engines
@pytest.mark.parametrize("draft", ["tiny-10m-draft-1l", LOOKUP])
def test_a_prompt_that_is_repeated_is_drafted_as_before(exported: dict[str, Path], draft: str) -> None:
    with LlamaCpp(str(exported["tiny-10m"]), str(exported.get(draft, draft)), real_options()) as engine:
        knobs = engine.resolve_knobs({} if draft != LOOKUP else {"size_n": 3, "size_m": 5})
        served = engine.serve(knobs)
        first, again = ([served.generate(prompt, 60) for prompt in PROMPTS] for _ in range(2))
        engine.check_effect(knobs, first)
        assert not engine.remembers
        for text, repeated in zip(first, again, strict=True):
            assert (text.tokens, text.drafted, text.accepted) == (repeated.tokens, repeated.drafted, repeated.accepted)


@pytest.mark.engines
def test_sampled_text_of_a_seed_stays_the_plain_one(exported: dict[str, Path]) -> None:
    with LlamaCpp(str(exported["tiny-10m"]), str(exported["tiny-10m-draft-1l"]), real_options()) as engine:
        plain, drafting = engine.serve(None), engine.serve({})
        texts = [
            (plain.generate(PROMPTS[0], 20, 1.0, seed), drafting.generate(PROMPTS[0], 20, 1.0, seed))
            for seed in range(8)
        ]
    assert sum(drafted.accepted or 0 for _, drafted in texts) > 0
    assert len({text.text for text, _ in texts}) == 8
    # The same draws decide. Sums of other batches round otherwise, which moves a draw to a neighbour of its token now
    # and then: among tokens so unlikely that rounding matters.
    first = [
        next(((ours, theirs) for ours, theirs in zip(*pair, strict=True) if ours != theirs), (0, 0))
        for pair in ((text.tokens or (), drafted.tokens or ()) for text, drafted in texts)
    ]
    assert max(abs(ours - theirs) for ours, theirs in first) <= 4


@pytest.mark.engines
def test_a_running_b11549_ignores_settings_of_requests(exported: dict[str, Path]) -> None:
    paths = str(exported["tiny-10m"]), str(exported["tiny-10m-draft-1l"])
    with LlamaCpp(*paths, real_options()) as engine:
        served: llama_cpp._LlamaServed = engine.serve({"n_max": 3})  # type: ignore[assignment]
        running = LlamaCpp(*paths, EngineOptions(address=served._client.address))
        for setting in ({"n_max": 8}, {"p_min": 0.9}, None):
            with pytest.raises(SettingIgnoredError):
                running.serve(setting)
        assert running.serve({"n_max": 3}).generate(PROMPTS[0], 30).drafted


@pytest.mark.engines
def test_what_llama_cpp_does_with_settings_that_are_refused_or_added_here(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """Facts of b11549 that the adaptor is made for."""
    target, draft = (str(path) for path in exported.values())
    model, tokenizer = load_model("tiny-10m-draft-1l")
    model.resize_token_embeddings(4296, mean_resizing=False)
    other = tmp_path / "other.gguf"
    write_model(model, tokenizer, other, kind="f32")
    with pytest.raises(VocabularyMismatchError, match=r"4096 tokens and draft other.gguf has 4296"):
        LlamaCpp(target, str(other), real_options())
    with LlamaCpp(target, draft, real_options()) as engine:
        draft_simple = ["--spec-type", "draft-simple", "--spec-draft-model"]
        words = {
            "draft alone": ["--spec-draft-model", draft],
            "n_min above n_max": [*draft_simple, draft, "--spec-draft-n-max", "2", "--spec-draft-n-min", "4"],
            "another vocabulary": [*draft_simple, str(other)],
            "n-grams": ["--spec-type", "ngram-simple", "--spec-draft-n-max", "1", "--spec-ngram-simple-size-n", "2"],
        }
        texts = {}
        for name, more in words.items():
            port = free_port()
            with EngineProcess(name, [*engine._command, *engine.arguments(None, port), *more]) as process:
                client = llama_cpp.HttpClient(name, f"http://127.0.0.1:{port}", process)
                process.wait_until(partial(client.answers, "/health"), 60)
                texts[name] = llama_cpp._LlamaServed(client, process, 1024).generate(PROMPTS[0], 60)
    lookup = texts.pop("n-grams")
    assert {text.drafted for text in texts.values()} == {0}
    assert len(lookup.accepted_by_place or ()) == 48
    assert (lookup.accepted_by_place or (0, 0))[1] > 0
