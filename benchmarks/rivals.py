"""Other people's decoders as sides of a comparison: transformers, flashspec, llama.cpp and OpenVINO GenAI, all but the
first in environments of their own.

flashspec 0.3.1 (package index; Apache 2.0) is imported from its environment into this process, so that it computes with
the very models, torch and threads of all other sides. llama.cpp and OpenVINO GenAI work beside this process
(`open_engine`), with the target's weights in a GGUF file.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch

from specgym.decoding import (
    LOOKUP,
    Engine,
    EngineOptions,
    Generation,
    GgufSettings,
    ModelDrafter,
    Pair,
    Round,
    Sampling,
    Served,
    Side,
    TranslatedModel,
    cache_folder,
    open_engine,
    write_gguf,
)

FLASHSPEC = "flashspec==0.3.1"
LLAMA_CPP = "xllamacpp>=2026.10"
OPENVINO = "openvino-genai==2026.4.1"
STRATEGIES = ("draft", "lookup", "composite-g4", "composite-g6-f2")
"""Ways of flashspec to draft: its model alone, its look-up alone, and both together."""
GgufType = Literal["f16", "q8_0"]


class RivalError(RuntimeError):
    """A rival that cannot be installed; the message has pip's last words and the way out."""


def environment(requirement: str, *others: str) -> Path:
    """Return a virtual environment with a package, in specgym's cache; made by pip where it is not there.

    Args:
        requirement: the package and its version, installed without what it depends on.
        others: installed with all that they depend on.

    Raises:
        RivalError: pip failed; nothing is left behind.
    """
    folder = cache_folder() / "rivals" / requirement.replace(">=", "-").replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Installing {requirement} into {folder} (once)", file=sys.stderr, flush=True)
    # Scripts of an environment name its place, but nothing here calls them.
    with tempfile.TemporaryDirectory(prefix=".rival-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "environment"
        venv.create(fresh, with_pip=True)
        install = [str(python_of(fresh)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for arguments in filter(None, (["--no-deps", requirement], list(others))):
            done = subprocess.run([*install, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join(done.stderr.split())[-300:] or f"exit status {done.returncode}"
                raise RivalError(
                    f"pip could not install {' '.join(arguments)} ({said}); check its index, or leave this rival out "
                    "(--rivals)"
                )
        fresh.rename(folder)
    return folder


def python_of(folder: Path) -> Path:
    """Interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


class Rival(ABC):
    """Somebody else's way to generate as a side of the comparison: one round, which includes reading the prompt."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        knobs: Mapping[str, float] | None,
    ) -> Generation:
        """Generate to the end, greedily or at a temperature; there are no knobs."""
        tokens, seconds = self._text(list(prompt_ids), max_new_tokens, sampling, seed or 0)
        return Generation(tokens, [Round(tuple(tokens), 0, 0, 0.0, 0.0, seconds)], 0.0, "length")

    @abstractmethod
    def _text(self, prompt: list[int], most: int, sampling: Sampling, seed: int) -> tuple[list[int], float]:
        """The tokens of a text, at most so many, and the seconds that they took."""


class TransformersGenerate(Rival):
    """transformers' `generate`.

    Args:
        pair: loaded without prepacking; only its target is used.
        options: further arguments of `generate`, such as an assistant.
    """

    def __init__(self, pair: Pair, **options: Any) -> None:
        self.pair, self.options = pair, options

    def _text(self, prompt: list[int], most: int, sampling: Sampling, seed: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        batch = torch.tensor([prompt])
        warping: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            warping = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        started = time.perf_counter()
        model: Any = self.pair.target.model
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=most,
            pad_token_id=0,
            **warping,
            **self.options,
        )
        seconds = time.perf_counter() - started
        return output[0, len(prompt) :].tolist(), seconds


def transformers_sides(pair: Pair, lookup_tokens: Sequence[int]) -> dict[str, Side]:
    """transformers' assisted generation with its defaults, where the draft is a model, and its prompt lookup.

    Args:
        pair: loaded without prepacking.
        lookup_tokens: of drafts by prompt lookup, a side for each.
    """
    sides = {}
    if isinstance(pair.draft, ModelDrafter):
        draft, options = pair.draft.model, dict[str, Any]()
        assistant = draft.model
        if isinstance(draft, TranslatedModel):
            options = {"tokenizer": pair.tokenizer, "assistant_tokenizer": draft.translation.draft.tokenizer}
            # Sampling replaces its embeddings and output layer for good (transformers 5.23, candidate_generator.py).
            assistant = deepcopy(assistant)
        sides["assisted"] = Side(TransformersGenerate(pair, assistant_model=assistant, **options))
    for tokens in lookup_tokens:
        sides[f"lookup {tokens}"] = Side(TransformersGenerate(pair, prompt_lookup_num_tokens=tokens))
    return sides


class FlashspecGenerate(Rival):
    """flashspec's engine, with its default of 4 tokens where it asks for a number.

    Args:
        pair: loaded without prepacking; its models are used as they are.
        strategy: one of `STRATEGIES`; all but `lookup` need a draft that is a model.
    """

    def __init__(self, pair: Pair, strategy: str) -> None:
        flashspec, engine = importlib.import_module("flashspec"), importlib.import_module("flashspec.engine")
        self._torch_device = str(pair.target.device)
        model = pair.target.model
        self._target = engine.TargetModel(pair.target.name, self._torch_device, model.dtype, model=model)
        self._drafters = []
        if strategy != "lookup":
            assert isinstance(pair.draft, ModelDrafter)
            draft = pair.draft.model.model
            self._drafters = [engine.HuggingFaceDrafter("draft", self._torch_device, draft.dtype, model=draft)]
        if strategy != "draft":
            self._drafters.append(engine.NgramDrafter())
        self._strategy = strategy if strategy.startswith("composite") else "bandit"
        self._flashspec, self._engine = flashspec, engine
        self._eos = tuple(sorted(pair.eos_token_ids))

    def _text(self, prompt: list[int], most: int, sampling: Sampling, seed: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        config = self._flashspec.FlashSpecConfig(
            device=self._torch_device,
            drafter_strategy=self._strategy,
            eos_token_ids=self._eos,
            bandit=self._flashspec.BanditConfig(n_arms=1),
            sampling=self._flashspec.SamplingConfig(temperature=sampling.temperature),
        )
        for drafter in self._drafters:
            if hasattr(drafter, "set_temperature"):
                drafter.set_temperature(sampling.temperature)
        engine = self._engine.SpeculativeEngine(config, self._drafters, self._target)
        started = time.perf_counter()
        with torch.inference_mode():
            result = engine.generate(torch.tensor([prompt]), max_new_tokens=most)
        seconds = time.perf_counter() - started
        return result.output_ids[0, : result.n_tokens_generated].tolist(), seconds


def flashspec_sides(pair: Pair) -> dict[str, Side]:
    """Every strategy of flashspec that a pair allows; it is installed first, where it is not there.

    Args:
        pair: loaded without prepacking.

    Raises:
        RivalError: it cannot be installed.
    """
    folder = environment(FLASHSPEC, "pydantic>=2")
    packages = sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)})
    if packages not in sys.path:
        sys.path.append(packages)  # behind our own, so that torch, transformers and all else are ours
    logging.getLogger("flashspec").setLevel(logging.ERROR)
    drafts = isinstance(pair.draft, ModelDrafter) and not isinstance(pair.draft.model, TranslatedModel)
    return {
        f"flashspec {strategy}": Side(FlashspecGenerate(pair, strategy))
        for strategy in STRATEGIES
        if drafts or strategy == "lookup"
    }


class EngineGenerate(Rival):
    """An engine's server, timed by its own clock.

    Args:
        served: the engine at work with a setting.
    """

    def __init__(self, served: Served) -> None:
        self.served = served

    def _text(self, prompt: list[int], most: int, sampling: Sampling, seed: int) -> tuple[list[int], float]:
        text = self.served.generate(prompt, most, sampling.temperature, seed)
        return list(text.tokens or [0] * text.new_tokens), text.seconds + text.prompt_seconds


def llama_cpp_sides(target: str, kind: GgufType, threads: int, lookup_tokens: int) -> dict[str, Side]:
    """llama.cpp's plain decoding and its look-up, each by a server that ends with this process.

    Args:
        target: a model's name, as `load_model` takes it.
        kind: of the weights.
        threads: that it computes with.
        lookup_tokens: of a draft by look-up.

    Raises:
        RivalError: it cannot be installed.
    """
    options = EngineOptions(python=python_of(environment(LLAMA_CPP, LLAMA_CPP)), threads=threads)
    engine = open_engine("llama.cpp", str(_gguf(target, kind)), LOOKUP, options)
    return _engine_sides(f"llama.cpp {kind}", engine, lookup_tokens)


def openvino_sides(target: str, threads: int, lookup_tokens: int) -> dict[str, Side]:
    """OpenVINO GenAI's plain decoding and its prompt lookup, on float16 weights and in float32.

    Its default arithmetic is bfloat16 where the processor has it, whose texts are others.

    Args: as for `llama_cpp_sides`.

    Raises:
        RivalError: it cannot be installed.
    """
    python = python_of(environment(OPENVINO, OPENVINO))
    options = EngineOptions(python=python, threads=threads, float32=True)
    engine = open_engine("openvino", str(_gguf(target, "f16")), LOOKUP, options)
    return _engine_sides("openvino f32", engine, lookup_tokens)


def _gguf(target: str, kind: GgufType) -> Path:
    """A file of a target's weights in specgym's cache, written where it is not there."""
    file = cache_folder() / "rivals" / f"{target.replace('/', '--')}-{kind}.gguf"
    if not file.is_file():
        write_gguf(GgufSettings(target, file, type=kind))
    return file


def _engine_sides(name: str, engine: Engine, lookup_tokens: int) -> dict[str, Side]:
    """An engine without a draft, and with prompt lookup at a length."""
    return {
        name: Side(EngineGenerate(engine.serve(None))),
        f"{name} lookup": Side(EngineGenerate(engine.serve(engine.setting(lookup_tokens)))),
    }
