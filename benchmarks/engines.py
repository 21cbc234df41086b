"""Engines that people serve with, tuned on this machine: the recommended setting, the engine's own, and simple rivals.

    python -m benchmarks.engines
    python -m benchmarks.engines llama.cpp --pairs smollm2-4l --llama-cpp-python engines/bin/python --minutes 3

For each engine and pair `train.py --engine` chooses between the pair's draft and prompt lookup on training prompts, and
the settings are judged on held-out prompts of four sets. Model files are written first, into the folder of the models.
A run that is there already goes on, or is shown; another folder of runs (--runs) begins anew. Half an hour on two idle
cores, most of it for SmolLM2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from specgym.agents import EngineSettings, ResultTable, tune_engine
from specgym.decoding import LOOKUP, GgufSettings, resolve, write_gguf

EngineName = Literal["llama.cpp", "openvino", "transformers"]
AIM_OVER_DEFAULT, AIM_OVER_PLAIN = 1.25, 0.98
"""Speed of the recommended setting over the engine's own, and over plain decoding, that are aimed at."""
ALL = "all workloads"


@dataclass
class Settings:
    """Tune engines, and compare their settings."""

    engines: tyro.conf.Positional[tuple[EngineName, ...]] = ("llama.cpp", "openvino", "transformers")
    """Engines to tune."""
    pairs: tuple[str, ...] = ("smollm2-4l", "tiny-10m-2l")
    """Pairs of models, each with a draft that is a model."""
    llama_cpp_python: Path | None = None
    """Interpreter that xllamacpp is installed for. Defaults to this one, or llama-server on the path."""
    openvino_python: Path | None = None
    """Interpreter that openvino-genai is installed for. Defaults to this one."""
    models: Path = Path("benchmarks/engines/models")
    """Folder of the model files."""
    runs: Path = Path("benchmarks/engines/runs")
    """Folder of the runs."""
    minutes: float = 10.0
    """Time for measuring, for each engine and pair, at most."""
    tokens: int = 48
    """Tokens decoded of each prompt."""
    judged_prompts: int = 6
    """Held-out prompts of every set."""
    threads: int = 1
    """Threads of the engines. As many as there are cores wait for one another whenever the machine does something else,
    llama.cpp's most of all."""


def model_files(pair: str, engine: EngineName, folder: Path, kind: Literal["f16", "f32"] = "f16") -> tuple[str, str]:
    """Return a pair's target and draft in a format of the engine, written first where they are missing.

    Args:
        pair: name of it, with a draft that is a model.
        engine: that reads them.
        folder: for the files.
        kind: of matrices in GGUF files; OpenVINO GenAI 2026.4.1 reads f16 and not f32.
    """
    preset = resolve(pair)
    if preset.draft is None or not preset.draft_is_model:
        raise SystemExit(f"{pair} has no draft that is a model")
    if engine == "transformers":
        return preset.target, preset.draft
    folder.mkdir(parents=True, exist_ok=True)
    target, draft = (folder / f"{name}-{kind}.gguf" for name in (preset.target, preset.draft))
    if not target.is_file():
        write_gguf(GgufSettings(preset.target, target, type=kind))
    if not draft.is_file():
        write_gguf(GgufSettings(preset.draft, draft, like=target, type=kind))
    return str(target), str(draft)


def tuned(engine: EngineName, pair: str, settings: Settings) -> Path:
    """Tune an engine for a pair, or go on with the run that is there; return its folder."""
    name = f"{engine}-{pair}"
    folder = settings.runs / name
    if (folder / "table.json").is_file():
        return folder
    if (folder / "settings.json").is_file():
        return tune_engine(EngineSettings(), folder)
    target, draft = model_files(pair, engine, settings.models)
    pythons = {"llama.cpp": settings.llama_cpp_python, "openvino": settings.openvino_python, "transformers": None}
    return tune_engine(
        EngineSettings(
            engine=engine,
            target=target,
            draft=(draft, LOOKUP),
            minutes=settings.minutes,
            tokens=settings.tokens,
            judged_prompts=settings.judged_prompts,
            engine_python=pythons[engine],
            threads=settings.threads,
            name=name,
            runs=settings.runs,
        )
    )


def summary(folders: dict[tuple[EngineName, str], Path]) -> list[str]:
    """Return the lines of a Markdown table with a row for each run, of held-out prompts."""
    headings = ("engine", "pair", "recommended", "times plain", "times default", "worst set", "default, draft",
                "default, look-up", "one for all", "closed form", "measurements", "seconds", "aim")  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for (engine, pair), folder in folders.items():
        results = ResultTable.load(folder / "table.json").by_workload()
        recommendation = json.loads((folder / "recommendation.json").read_text(encoding="utf-8"))
        rows = results[ALL]
        best, closed_form = rows["recommended"], rows.get("closed form")
        worst = min(methods["recommended"].values["speedup"] for name, methods in results.items() if name != ALL)
        met = best.values["over_default"] >= AIM_OVER_DEFAULT and worst >= AIM_OVER_PLAIN
        setting = ", ".join(f"{name}={value:g}" for name, value in best.knobs.items())
        of_draft = "look-up" if recommendation["draft"] == LOOKUP else "draft"
        cells = (
            f"{engine} {recommendation['version']}",
            f"`{pair}`",
            f"{of_draft}, `{setting}`" if setting else "plain decoding",
            _with_interval(best.values["speedup"], best.intervals.get("speedup")),
            _with_interval(best.values["over_default"], best.intervals.get("over_default")),
            f"{worst:.2f}",
            f"{rows['default'].values['speedup']:.2f}",
            f"{rows[f'default, {LOOKUP}'].values['speedup']:.2f}",
            f"{rows['one for all'].values['speedup']:.2f}",
            "-" if closed_form is None else f"{closed_form.values['speedup']:.2f}",
            str(recommendation["measurements"]),
            f"{recommendation['seconds']:.0f}",
            "met" if met else "missed",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_interval(value: float, ends: tuple[float, float] | None) -> str:
    return f"{value:.2f}" if ends is None else f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def main() -> None:
    """Tune all engines for all pairs, and print what came of it."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.engines", description=__doc__)
    folders = {(engine, pair): tuned(engine, pair, settings) for pair in settings.pairs for engine in settings.engines}
    print("\n".join(summary(folders)))


if __name__ == "__main__":
    main()
