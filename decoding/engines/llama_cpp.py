"""llama.cpp's server: drafts of a model, or copies from the prompt, verified by a model of a GGUF file.

A setting is given when the server starts: b11549 takes `speculative.n_max` and its like in a request and ignores them
(b9093 follows them). So every setting is a process. Rules and defaults are those of b11549, unless another build is
named.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ..errors import ArgumentError, KnobError, VocabularyMismatchError
from ..traits import Knob
from .engine import LOOKUP, Engine, EngineError, EngineOptions, EngineText, Served, SettingIgnoredError
from .gguf_header import GgufHeader, read_header
from .http_client import HttpClient
from .process import EngineProcess, free_port

_WORKER: Final = Path(__file__).parent / "workers" / "llama_server.py"
_INSTALL: Final = (
    "pip install xllamacpp, for this Python or one that you name (--engine-python; python of EngineOptions), or name a "
    "llama-server (--engine-program; program of EngineOptions)"
)
_LEAST_CONTEXT: Final = 256
"""Tokens that b11549 gives to a text at least; it fails an assertion where it was told fewer than a draft is long."""
_QUIET: Final = {"GGML_NO_BACKTRACE": "1"}
"""Environment in which the last words of a server that fails an assertion are the assertion (ggml/src/ggml.c)."""
_FIRST_FORGETTING: Final = 11549
"""Build that drafts a prompt sent twice as it did the first time; b9093 drafts its own last answer."""
_ALL_FLOAT32: Final = 0
"""Number of the file type whose tensors are all in float32 (`llama_ftype` in include/llama.h)."""
_MOST_DIFFERENCE: Final = 128
_FIRST_COMPARED: Final = 5
"""Tokens by which vocabularies may differ in size, and the first one whose text must be the same
(SPEC_VOCAB_MAX_SIZE_DIFFERENCE and SPEC_VOCAB_CHECK_START_TOKEN_ID in llama.cpp's common/speculative.cpp)."""
_COUNTERS: Final = re.compile(
    r'llamacpp:spec_decode_(num_drafts)_total (\d+)|llamacpp:spec_decode_.*_per_pos_total\{position="(\d+)"\} (\d+)'
)
_PROBE: Final = "one two three four five six seven eight nine ten one two three four five six"
_PROBED_TOKENS: Final = 24
_SECONDS_FOR_VERSION: Final = 60.0

_DRAFT_KNOBS: Final = (
    Knob("n_max", 0, 64, 3, integer=True, search=(0, 16), doc="tokens drafted a round (--spec-draft-n-max)"),
    Knob("n_min", 0, 64, 0, integer=True, search=(0, 4), doc="shorter drafts are dropped (--spec-draft-n-min)"),
    Knob(
        "p_min",
        0,
        1,
        0,
        search=(0, 0.95),
        doc="a draft ends before a token less likely than this among its ten likeliest (--spec-draft-p-min)",
    ),
)
_LOOKUP_KNOBS: Final = (
    Knob("size_m", 0, 128, 48, integer=True, search=(0, 48), doc="tokens copied (--spec-ngram-simple-size-m)"),
    Knob("size_n", 1, 64, 12, integer=True, search=(1, 16), doc="tokens looked up (--spec-ngram-simple-size-n)"),
)
_FLAGS: Final = {
    "n_max": "--spec-draft-n-max",
    "n_min": "--spec-draft-n-min",
    "p_min": "--spec-draft-p-min",
    "size_m": "--spec-ngram-simple-size-m",
    "size_n": "--spec-ngram-simple-size-n",
}


class LlamaCpp(Engine):
    """A server of llama.cpp with a draft model (`draft-simple`) or copies from the prompt (`ngram-simple`).

    The server is the program of the options, or xllamacpp in the Python of the options, or a llama-server on the path,
    or xllamacpp in this Python, whichever comes first; or one that runs already, by its address. The settings of a
    running server are its own: another one is refused unless a trial shows that the server follows requests.

    Args:
        target: GGUF file; of a running server, any name.
        draft: GGUF file with the target's vocabulary, `LOOKUP` or None.
        options: how the engine is run.

    Raises:
        EngineError: there is no llama.cpp, or the running one does not answer.
        ArgumentError: a file is missing or is no GGUF file, or float32 is asked for and the target is in another type.
        VocabularyMismatchError: the draft has another vocabulary than the target, with which llama.cpp would start,
            and draft nothing.
    """

    name = "llama.cpp"
    package = "xllamacpp 2026.10.11549 (llama.cpp b11549)"
    stop = "llama.cpp"

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        super().__init__(target, draft, options)
        self._served: list[_LlamaServed] = []
        if draft == LOOKUP:
            self.knobs, self.length_knob = _LOOKUP_KNOBS, "size_m"
        elif draft is None:
            self.knobs, self.length_knob = (), "n_max"
        else:
            self.knobs, self.length_knob, self.threshold_knob = _DRAFT_KNOBS, "n_max", "p_min"
        if self.options.address is not None:
            self._running: HttpClient | None = HttpClient(self.name, self.options.address)
            self._chats = True
            self._command: list[str] = []
            build = str(self._running.get("/props").get("build_info", "of an unknown build"))
            self._version = build.partition("-")[0]
        else:
            header = read_header(Path(target))
            if self.options.float32 and header.get("general.file_type") != _ALL_FLOAT32:
                raise ArgumentError(
                    f"{target} is not in float32, and llama.cpp computes with the types of the file; write it with "
                    "python -m specgym.decoding.engines.gguf ... --type f32, or leave float32 out"
                )
            if draft not in (LOOKUP, None):
                require_same_vocabulary(header, read_header(Path(draft)))
            self._running = None
            self._chats = header.get("tokenizer.chat_template") is not None  # without one the server has its own
            self._command, self._version = _find_program(self.options)
        number = re.fullmatch(r"b(\d+)", self._version)
        self.remembers = number is None or int(number[1]) < _FIRST_FORGETTING

    def version(self) -> str:
        return self._version

    def resolve_knobs(self, knobs: Mapping[str, float]) -> dict[str, float]:
        values = super().resolve_knobs(knobs)
        fewest, most = values.get("n_min", 0), values.get("n_max", 0)
        if fewest > most > 0:
            raise KnobError(
                f"n_min is {fewest:g} and n_max {most:g}: llama.cpp would draft in every round and drop every draft. "
                "Lower n_min, or raise n_max"
            )
        return values

    def nearest(self, knobs: Mapping[str, float]) -> dict[str, float]:
        fewest = {"n_min": min(knobs["n_min"], knobs["n_max"])} if "n_min" in knobs else {}
        return {**knobs, **fewest}

    def fixed_length(self, knobs: Mapping[str, float]) -> bool:
        return super().fixed_length(knobs) and not knobs.get("n_min")

    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        values = None if knobs is None else self.resolve_knobs(knobs)
        if values is not None and not values.get(self.length_knob):
            values = None
        served = self._start(values) if self._running is None else self._join(self._running, values)
        self._served.append(served)
        return served

    def close(self) -> None:
        while self._served:
            self._served.pop().close()

    def _start(self, knobs: Mapping[str, float] | None) -> _LlamaServed:
        port = free_port()
        command = [*self._command, *self.arguments(knobs, port)]
        process = EngineProcess(self.name, command, self.options.log, environment=_QUIET)
        client = HttpClient(self.name, f"http://127.0.0.1:{port}", process)
        process.wait_until(lambda: client.answers("/health"), self.options.seconds_to_start)
        return _LlamaServed(client, process, self.options.context, chats=self._chats)

    def arguments(self, knobs: Mapping[str, float] | None, port: int) -> list[str]:
        """Return the arguments of llama-server for a setting.

        Args:
            knobs: every knob's value; None for plain decoding.
            port: that the server shall listen at.
        """
        arguments = ["--model", self.target, "--host", "127.0.0.1", "--port", str(port), "--metrics"]
        # One text at a time. The cache of earlier prompts' states would be filled between two texts.
        arguments += [
            "--ctx-size",
            str(max(self.options.context, _LEAST_CONTEXT)),
            "--parallel",
            "1",
            "--cache-ram",
            "0",
        ]
        threads = [] if self.options.threads is None else [str(self.options.threads)]
        arguments += [word for number in threads for word in ("--threads", number)]
        if knobs is None:
            return arguments
        if self.draft == LOOKUP:
            arguments += ["--spec-type", "ngram-simple"]
        else:
            # A draft model alone is loaded and never used (ggml-org/llama.cpp, pull request 23988).
            arguments += ["--spec-type", "draft-simple", "--spec-draft-model", str(self.draft)]
            arguments += [word for number in threads for word in ("--spec-draft-threads", number)]
        return arguments + [word for name, value in knobs.items() for word in (_FLAGS[name], f"{value:g}")]

    def _join(self, client: HttpClient, knobs: Mapping[str, float] | None) -> _LlamaServed:
        """A running server with a setting, if it can be made to follow it, or has it.

        Raises:
            SettingIgnoredError: it does something else.
            EngineError: it cannot do that at all.
        """
        how = "start one with this setting, or let specgym start it (no address)"
        if knobs is None:
            served = _LlamaServed(client, None, self.options.context, {"speculative.n_max": 0})
            if served.generate(_PROBE, _PROBED_TOKENS).drafted:
                raise SettingIgnoredError(f"llama.cpp at {client.address} drafts although told not to; {how}")
            return served
        if self.draft == LOOKUP:
            raise EngineError(f"llama.cpp at {client.address} takes no setting of n-grams in a request; {how}")
        trials = [knobs]
        if knobs["n_min"] or knobs["p_min"]:  # what these do shows in no single text
            trials = [{"n_max": length, "n_min": 0, "p_min": 0} for length in (1, 4)]
        for trial in trials:
            probe = _LlamaServed(client, None, self.options.context, _request(trial))
            self.check_effect(trial, [probe.generate(_PROBE, _PROBED_TOKENS)])
        return _LlamaServed(client, None, self.options.context, _request(knobs))


class _LlamaServed(Served):
    """A server of llama.cpp.

    Args:
        client: talks to it.
        process: the server, if it is ours.
        context: tokens of prompt and text, at most.
        request: added to every request.
        chats: whether the target has a chat template.
    """

    def __init__(
        self,
        client: HttpClient,
        process: EngineProcess | None,
        context: int,
        request: Mapping[str, object] | None = None,
        chats: bool = True,
    ) -> None:
        self._chats = chats
        self._client, self._process, self._context = client, process, context
        self._request = request or {}
        self._counts = self._read_counts()

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> EngineText:
        answer = self._client.post(
            "/completion",
            {
                "prompt": prompt if isinstance(prompt, str) else [int(token) for token in prompt],
                "n_predict": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "samplers": ["temperature"],
                "cache_prompt": False,
                "return_tokens": True,
                **self._request,
            },
        )
        if answer.get("truncated"):
            raise ArgumentError(
                f"prompt and text do not fit into {self._context} tokens of context; raise it (--context; context of "
                "EngineOptions)"
            )
        timings = answer["timings"]
        new_tokens = int(timings["predicted_n"])
        accepted = int(timings.get("draft_n_accepted", 0))
        counts, before = self._read_counts(), self._counts
        self._counts = counts
        drafts = counts.get("num_drafts", 0) - before.get("num_drafts", 0)
        places = [name for name in counts if name.isdigit()]
        return EngineText(
            text=str(answer["content"]),
            tokens=[int(token) for token in answer.get("tokens", ())] or None,
            new_tokens=new_tokens,
            seconds=timings["predicted_ms"] / 1000,
            prompt_seconds=timings["prompt_ms"] / 1000,
            drafted=int(timings.get("draft_n", 0)),  # absent when nothing was drafted
            accepted=accepted,
            # Every round adds the target's own token, but for one that ends with an accepted end of text.
            rounds=max(new_tokens - 1 - accepted, drafts),
            accepted_by_place=[counts[place] - before.get(place, 0) for place in places] or None,
        )

    def chat_prompt(self, message: str) -> str:
        if not self._chats:
            return message
        messages = [{"role": "user", "content": message}]
        return str(self._client.post("/apply-template", {"messages": messages})["prompt"])

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()

    def _read_counts(self) -> dict[str, int]:
        """Prometheus counters of drafts: by name, and of accepted tokens by place; none of a server of others."""
        if self._process is None:
            return {}
        lines = self._client.text("/metrics").splitlines()
        pattern = re.compile(
            r'llamacpp:spec_decode_(num_drafts)_total (\d+)|.*_per_pos_total\{position="(\d+)"\} (\d+)'
        )
        matches = [match for line in lines if (match := pattern.match(line))]
        return {match[1] or match[3]: int(match[2] or match[4]) for match in matches}


def require_same_vocabulary(target: GgufHeader, draft: GgufHeader) -> None:
    """Raise VocabularyMismatchError unless llama.cpp would use a draft for a target.

    It compares kinds, sizes and texts of tokens (`common_speculative_are_compatible` in common/speculative.cpp), and
    serves without drafts where they differ (b11549).
    """
    ours, theirs = target.tokens, draft.tokens
    sizes = f"target {target.path.name} has {len(ours)} tokens and draft {draft.path.name} has {len(theirs)}"
    way_out = "llama.cpp would serve without drafting. Take a draft of this target, or prompt-lookup"
    if abs(len(ours) - len(theirs)) > _MOST_DIFFERENCE:
        raise VocabularyMismatchError(f"{sizes}: {way_out}")
    for key in ("model", "bos_token_id", "eos_token_id"):
        pair = [header.get(f"tokenizer.ggml.{key}") for header in (target, draft)]
        if pair[0] != pair[1]:
            raise VocabularyMismatchError(
                f"{sizes}, and their tokenizers differ in {key} ({pair[0]}, {pair[1]}): {way_out}"
            )
    for number in range(_FIRST_COMPARED, min(len(ours), len(theirs))):
        if ours[number] != theirs[number]:
            raise VocabularyMismatchError(
                f"{sizes}, and token {number} is {ours[number]!r} and {theirs[number]!r}: {way_out}"
            )


def _request(knobs: Mapping[str, float]) -> dict[str, object]:
    """The fields of a request for a setting."""
    numbers = {knob.name: int(knobs[knob.name]) if knob.integer else knobs[knob.name] for knob in _DRAFT_KNOBS}
    return {f"speculative.{name}": value for name, value in numbers.items()}


def _find_program(options: EngineOptions) -> tuple[list[str], str]:
    """Command of a server and its build, such as b11549.

    Raises:
        EngineError: there is none.
    """
    program = options.program
    if program is None and options.python is None:
        on_path = shutil.which("llama-server")
        program = None if on_path is None else Path(on_path)
    if program is not None:
        build = re.search(r"version:\s*(\d+)", _output([str(program), "--version"]))
        return [str(program)], "of an unknown build" if build is None else f"b{build[1]}"
    if options.python is None and importlib.util.find_spec("xllamacpp") is None:
        raise EngineError(f"there is no llama.cpp: {_INSTALL}")
    command = [str(options.python or sys.executable), str(_WORKER)]
    build = re.search(r"(\d+)\s*$", _output([*command, "--version"]))
    return command, "of an unknown build" if build is None else f"b{build[1]}"


def _output(command: Sequence[str]) -> str:
    """Return what a command prints; llama-server prints its version to stderr.

    Raises:
        EngineError: it cannot be run.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS_FOR_VERSION,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"llama.cpp cannot be run: {error}. {_INSTALL}") from error
    if done.returncode:
        raise EngineError(f"llama.cpp cannot be run: {' '.join(done.stdout.split())}. {_INSTALL}")
    return done.stdout
