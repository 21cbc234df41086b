"""Settings of a run that tunes an engine, and how they are read again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, get_args

from specgym.decoding import (
    LARGEST_SEED,
    LOOKUP,
    EngineOptions,
    SpecgymError,
    check_fields,
    number,
    whole_number,
)

from ..training.run_folder import RunFileError, RunFolder, read_json
from ..training.settings_io import SETTINGS_FORMAT, SettingsError, from_json

MethodName = Literal["tuner", "closed-form", "gp", "tpe"]
EXPERIMENT: Final = "tune-engine"
"""Kind of a run in its ``settings.json``."""
SETS: Final = ("prose", "code", "definitions", "chat")
EngineName = Literal["llama.cpp", "openvino", "transformers", "vllm"]
_LEAST_PER_DRAFT: Final = 3


@dataclass(frozen=True)
class EngineSettings:
    """Tune an engine that you serve with: measure settings on your prompts, and say which to serve with.

    Every measurement decodes prompts plainly and with a setting in turns, on the engine itself. The setting that pays
    best is judged on held-out prompts, beside the engine's own.

    Raises:
        ArgumentError: a number is out of range.
    """

    engine: EngineName | None = None
    """Engine to tune."""
    target: str = ""
    """Target in a format of the engine: a GGUF file, an OpenVINO folder, a Hugging Face folder or name."""
    draft: tuple[str, ...] = (LOOKUP,)
    """Drafts to choose from, likewise; prompt-lookup copies from the prompt and needs no model. Settings are compared
    with the engine's default for the first."""
    prompts: tuple[str, ...] = SETS
    """Sets of prompts: shipped ones, or files (.txt, .jsonl, .json). A quarter of a file is kept for judging."""
    temperature: float = 0.0
    """Sampling temperature; 0 for greedy decoding."""
    minutes: float = 10.0
    """Time for measuring, at most, without judging."""
    measurements: int = 12
    """Settings to measure, at most, for all drafts together."""
    methods: tuple[MethodName, ...] = ("tuner",)
    """Methods that propose settings, each with its own measurements and minutes: the tuner that ships, and rivals. The
    first one's setting is recommended."""
    recorded: tuple[str, ...] = ()
    """Workloads of the same pair whose traces ship, such as smollm2-4l/prose: the tuner practises on them, at the costs
    that it measured on the engine, and measures what was best there first."""
    measured_prompts: int = 2
    """Prompts of every set to decode for a measurement."""
    judged_prompts: int = 6
    """Held-out prompts of every set to judge by."""
    tokens: int = 48
    """Tokens to decode of each prompt, at most."""
    slower_sets: bool = False
    """Recommend what pays on the whole even where it is slower than plain decoding on some set of prompts."""
    engine_python: Path | None = None
    """Python interpreter that the engine is installed for. Defaults to this one."""
    engine_program: Path | None = None
    """Program of the engine, such as llama-server. Defaults to the one on the path, or the engine's Python package."""
    engine_address: str | None = None
    """Address of an engine that runs already, such as http://localhost:8000; it is never restarted or stopped."""
    threads: int | None = None
    """Threads that the engine computes with. Defaults to the machine's cores."""
    float32: bool = False
    """Let the engine compute in float32 where it would round to fewer bits: slower, and greedy text is then the same at
    every setting."""
    context: int = 2048
    """Tokens of prompt and text together, at most."""
    seconds_to_start: float = 600.0
    """Time that the engine may take to start. vLLM needs minutes on a CPU."""
    seed: int = 0
    """Seed of the order of the prompts, of sampling and of searches."""
    name: str = ""
    """Name of the run; by default the engine's and the time."""
    runs: Path = Path("runs")
    """Folder of all runs."""

    def __post_init__(self) -> None:
        for name in ("measurements", "measured_prompts", "judged_prompts", "context"):
            check_fields(self, whole_number, name)
        whole_number("tokens", self.tokens, at_least=2)
        whole_number("seed", self.seed, at_least=0, at_most=LARGEST_SEED)
        if self.threads is not None:
            whole_number("threads", self.threads)
        number("minutes", self.minutes, above=0)
        number("seconds_to_start", self.seconds_to_start, above=0)
        number("temperature", self.temperature, at_least=0)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.runs / self.name

    @property
    def options(self) -> EngineOptions:
        """Ways to run the engine."""
        return EngineOptions(
            python=self.engine_python,
            program=self.engine_program,
            address=self.engine_address,
            threads=self.threads,
            float32=self.float32,
            context=self.context,
            seconds_to_start=self.seconds_to_start,
            log=self.folder / "engine.log",
        )

    def check(self) -> None:
        """Refuse what cannot be tuned, before anything is started.

        Raises:
            SettingsError: something is missing, comes twice or is too little.
        """
        if self.engine is None:
            raise SettingsError(f"name the engine with --engine: {', '.join(get_args(EngineName))}")
        if not self.target:
            raise SettingsError(f"name the target for {self.engine} with --target, such as --target model.gguf")
        for what, values in (("draft", self.draft), ("prompts", self.prompts), ("methods", self.methods)):
            if not values or len(set(values)) < len(values):
                raise SettingsError(f"--{what} takes one or several different names, got: {' '.join(values) or 'none'}")
        least = _LEAST_PER_DRAFT * len(self.draft)
        if self.measurements < least:
            raise SettingsError(
                f"--measurements {self.measurements} are too few for {len(self.draft)} drafts; give at least {least}"
            )


def is_engine_run(folder: Path) -> bool:
    """Return whether a folder is that of a run that tuned an engine.

    Raises:
        RunFileError: its settings are damaged.
    """
    settings = RunFolder(folder).settings
    return settings.is_file() and read_json(settings, _WAY_OUT, SETTINGS_FORMAT).get("experiment") == EXPERIMENT


_WAY_OUT: Final = "is it the folder of a run that train.py wrote?"


def load_engine_settings(folder: Path) -> EngineSettings:
    """Read the settings of a run that tuned an engine; its folder is where it now lies.

    Raises:
        RunFileError: they are missing or damaged.
    """
    path = RunFolder.existing(folder).settings
    content = read_json(path, _WAY_OUT, SETTINGS_FORMAT)
    try:
        settings: EngineSettings = from_json(EngineSettings(), content["settings"], "settings")
    except (SpecgymError, KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path}: {error}; {_WAY_OUT}") from error
    return replace(settings, runs=folder.parent, name=folder.name)
