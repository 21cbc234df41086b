"""Agreement of replay with engines: drafted and accepted tokens and rounds of greedy texts, text by text.

    python -m benchmarks.engine_agreement
    python -m benchmarks.engine_agreement openvino --pairs tiny-10m-3m --openvino-python engines/bin/python

Every setting is replayed from the traces that ship, by the engine's stop rule (`specgym.envs.engine_counts`), and
decoded by the engine in float32. A text counts as equal where all three counts are. Thresholds are
`tellable_threshold`s. Texts that the engine writes otherwise are counted apart.
A quarter of an hour on two idle cores, most of it for SmolLM2.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.engines import EngineName, model_files
from specgym.decoding import ENGINE_SETTINGS, Engine, EngineOptions, open_engine
from specgym.envs import EngineCounts, Trace, engine_counts, find_trace, tellable_threshold

LENGTHS = (1, 3, 5, 8, 12, 16)
THRESHOLDS = tuple(map(tellable_threshold, (0.3, 0.5, 0.8)))


@dataclass
class Settings:
    """Compare counts of engines with those of replay."""

    engines: tyro.conf.Positional[tuple[EngineName, ...]] = ("llama.cpp", "openvino", "transformers")
    """Engines to compare with."""
    pairs: tuple[str, ...] = ("tiny-10m-2l", "tiny-10m-xs", "tiny-10m-3m", "smollm2-4l")
    """Pairs of models, each with a draft that is a model."""
    llama_cpp_python: Path | None = None
    """Interpreter that xllamacpp is installed for. Defaults to this one, or llama-server on the path."""
    openvino_python: Path | None = None
    """Interpreter that openvino-genai is installed for. Defaults to this one."""
    models: Path = Path("benchmarks/engines/models")
    """Folder of the model files."""
    prompts: tuple[str, ...] = ("prose", "code")
    """Sets of prompts."""
    texts: int = 4
    """Test prompts of each set."""
    tokens: int = 48
    """Tokens of a text, or as many as were recorded."""
    threads: int | None = None
    """Threads of the engines. Defaults to the machine's cores."""
    json: Path | None = None
    """File for the engines' counts, text by text: drafted, accepted, rounds."""


@dataclass(frozen=True)
class Compared:
    """Texts of a set of prompts with a setting, as an engine counts them and as replay does."""

    prompts: str
    knobs: dict[str, float]
    engine: list[EngineCounts | None]
    """None for a text that the engine writes otherwise."""
    replay: list[EngineCounts]

    @property
    def pairs(self) -> list[tuple[EngineCounts, EngineCounts]]:
        """Counts of the texts that are the same."""
        return [(theirs, ours) for theirs, ours in zip(self.engine, self.replay, strict=True) if theirs is not None]


def settings_of(engine: EngineName) -> list[dict[str, float]]:
    """Return the settings that are compared, as knobs of ours: lengths alone, and with thresholds where there are."""
    known = ENGINE_SETTINGS[engine].settings
    lengths: list[dict[str, float]] = [{"draft_length": float(length)} for length in LENGTHS]
    if "stop_threshold" not in known:
        return lengths
    with_thresholds = [
        {"draft_length": float(length), "stop_threshold": threshold}
        for length, threshold in itertools.product((5, 16), THRESHOLDS)
    ]
    fewest = [{**with_thresholds[0], "min_draft_length": 2.0}] if "min_draft_length" in known else []
    return [*({**knobs, "stop_threshold": 0.0} for knobs in lengths), *with_thresholds, *fewest]


def in_its_terms(engine: Engine, knobs: dict[str, float]) -> dict[str, float]:
    """Return a setting of ours with the names of an engine's knobs."""
    values = engine.setting(int(knobs["draft_length"]), knobs.get("stop_threshold", 0.0))
    return {**values, **({"n_min": knobs["min_draft_length"]} if "min_draft_length" in knobs else {})}


def compared(name: EngineName, pair: str, settings: Settings) -> list[Compared]:
    """Decode and replay all settings of an engine for a pair."""
    target, draft = model_files(pair, name, settings.models, "f32" if name == "llama.cpp" else "f16")
    pythons = {"llama.cpp": settings.llama_cpp_python, "openvino": settings.openvino_python, "transformers": None}
    options = EngineOptions(python=pythons[name], threads=settings.threads, float32=True)
    results = []
    with open_engine(name, target, draft, options) as engine:
        traces: dict[str, tuple[Trace, Sequence[Sequence[int]]]] = {}
        for prompts in settings.prompts:
            trace, named = find_trace(None, f"{pair}/{prompts}", "test")
            traces[prompts] = trace, named.encoded("test", trace.info.max_prompt_tokens)[: settings.texts]
        for knobs in settings_of(name):
            with engine.serve(in_its_terms(engine, knobs)) as served:
                for prompts, (trace, ids) in traces.items():
                    tokens = min(settings.tokens, trace.info.tokens)
                    theirs: list[EngineCounts | None] = []
                    for place, prompt in enumerate(ids):
                        text = served.generate(prompt, tokens)
                        start, end = trace.starts[place : place + 2].tolist()
                        same = list(text.tokens or ()) == trace.text[start:end][:tokens].tolist()
                        counts = EngineCounts(text.drafted or 0, text.accepted or 0, text.rounds or 0)
                        theirs.append(counts if same else None)
                    replayed = engine_counts(trace, name, knobs, tokens)[: len(ids)]
                    results.append(Compared(prompts, knobs, theirs, replayed))
    return results


def main() -> None:
    """Compare, and print a table with a row for each engine and pair."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.engine_agreement", description=__doc__)
    print("| engine | pair | settings | texts | other text | equal counts | drafted | replayed | accepted | replayed |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    everything = {}
    for name, pair in itertools.product(settings.engines, settings.pairs):
        results = compared(name, pair, settings)
        everything[f"{name}/{pair}"] = [
            {"prompts": result.prompts, "knobs": result.knobs, "counts": result.engine} for result in results
        ]
        texts = sum(len(result.engine) for result in results)
        same = [both for result in results for both in result.pairs]
        equal = sum(theirs == ours for theirs, ours in same)
        sums = [sum(both[side][what] for both in same) for what in (0, 1) for side in (0, 1)]
        cells = [
            name, f"`{pair}`", len(settings_of(name)), texts, texts - len(same), f"{equal} of {len(same)}", *sums,
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if settings.json is not None:
        settings.json.write_text(json.dumps(everything), encoding="utf-8")


if __name__ == "__main__":
    main()
