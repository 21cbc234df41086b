"""Exports: settings of a run or of a recommendation, written for an engine that people serve with.

Engines have exact decoding with chains of drafted tokens; what was learned for other decoding is refused, with the way
to what they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from specgym.decoding import (
    ENGINE_SETTINGS,
    LOOKUP,
    ArgumentError,
    ServedSetting,
    SpecgymError,
    SpeculativeDecoder,
    export_setting,
    file_name,
    setting_of_pair,
    traits_of,
)
from specgym.envs import environment_id, workload

from ..engines.command import FORMAT as OF_ENGINE
from ..engines.settings import is_engine_run
from ..evaluation.results import ALL, LEARNED, ResultTable
from ..experiments.experiment import load_settings
from ..training.run_folder import RunFileError, RunFolder, console, read_json
from ..training.settings_io import SettingsError
from .recommend import load_knobs
from .recommend_exact import FORMAT as OF_EXACT
from .recommend_pair import FORMAT as OF_DECODER

FOLDER: Final = "export"
"""Folder of exports, in that of the run."""
_CHAIN: Final = frozenset({"draft_length", "stop_threshold", "min_draft_length"})
"""Knobs of exact decoding with chains, all that engines have some name for."""
_LENGTH: Final = re.compile(r"length (\d+)")


class Item(NamedTuple):
    """A setting to be written.

    Attributes:
        name: of what it is for, a workload or a target.
        setting: to be written; an error where it cannot be.
        note: where it comes from, and what is lost.
    """

    name: str
    setting: ServedSetting | SpecgymError
    note: str = ""


def export_for_engine(folder: Path, engine: str) -> list[Path]:
    """Write the settings of a run, or of a recommendation, for an engine; print them.

    Args:
        folder: of the run, or of ``recommendation.json``. What is written lies in ``export/<engine>`` in it.
        engine: one of `EXPORT_ENGINES`.

    Returns:
        Paths of what was written.

    Raises:
        SettingsError: there is nothing that the engine could take; the message says what it has.
        RunFileError: a file is missing or damaged, or the folder is none of a run.
    """
    items = list(_items(folder, engine))
    written: list[Path] = []
    for item in items:
        if isinstance(item.setting, SpecgymError):
            console.print(f"{item.name}: {item.setting}", highlight=False, soft_wrap=True, markup=False)
            continue
        export = export_setting(engine, item.setting)
        place = folder / FOLDER / file_name(engine) / file_name(item.name)
        written += export.save(place)
        lines = [
            f"{item.name}, {engine} {export.version}, in {place}:",
            *([item.note] if item.note else []),
            *export.notes,
            export.arguments,
            "",
        ]
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    if not written:
        raise SettingsError(f"nothing of {folder} can be written for {engine}")
    return written


def _items(folder: Path, engine: str) -> Iterator[Item]:
    recommendation = folder / "recommendation.json"
    if recommendation.is_file():
        yield _of_recommendation(recommendation, engine)
        return
    try:
        run = RunFolder.existing(folder)
    except RunFileError as error:
        raise RunFileError(f"{error}; nor has it a recommendation.json") from error
    if is_engine_run(folder):
        raise RunFileError(f"{folder} recommends nothing yet; go on with: python train.py --resume {folder}")
    settings = load_settings(run.settings)
    if settings.EXPERIMENT == "round-knobs":
        raise SettingsError(
            f"{engine} takes no policy that chooses knobs round by round. {run.table} says, as fixed, which setting is "
            "best for whole texts of each workload; set it by hand"
        )
    if getattr(settings, "decoder", SpeculativeDecoder.name) != SpeculativeDecoder.name:
        known = load_knobs(run.knobs)["workloads"].values() if run.knobs.is_file() else ()
        names = next((list(knobs) for knobs in known if knobs), [])
        options = settings.options if settings.EXPERIMENT == "tune-unseen" else settings.decoder_options
        raise _refusal(engine, settings.decoder, names, options, str(folder))
    if settings.EXPERIMENT == "tune-knobs":
        if settings.decoder_options["stop"] == "expected-gain":
            raise SettingsError(
                f"{folder} has drafts that end by the expected gain, which {engine} does not weigh. Tune by a rule "
                f"that engines have: python train.py {settings.option} --environment.stop never (or transformers, or "
                "llama.cpp)"
            )
        yield from _of_knobs(run, settings, engine)
    elif settings.EXPERIMENT == "stop-drafts":
        if settings.overlap is not None:
            raise SettingsError(
                f"{folder} is of a draft that goes on while the target verifies, and in {engine} they take turns. "
                f"Learn without --overlap: python train.py {settings.option}"
            )
        yield from _of_policies(run, engine)
    elif settings.EXPERIMENT == "choose-drafts":
        raise SettingsError(
            f"{engine} takes no policy that chooses among several drafts. {run.table} says, as hybrid, by which fixed "
            "rule an engine would choose best on each workload, and as single which draft is best alone; set it by hand"
        )
    else:
        raise SettingsError(
            f"{folder} recommends settings for pairs, and has none of its own: python evaluate.py {folder} --pair "
            f"target+draft writes the folder of a recommendation, which --export takes"
        )


def _of_knobs(run: RunFolder, settings: Any, engine: str) -> Iterator[Item]:
    """The recommended knobs of every workload."""
    rule = settings.decoder_options["stop"]
    for name, knobs in load_knobs(run.knobs, settings.workloads)["workloads"].items():
        yield _of_pair(name, knobs, rule, "Recommended by the run." if knobs else "Nothing pays, by the run.")


def _of_policies(run: RunFolder, engine: str) -> Iterator[Item]:
    """The best fixed length of every workload, by batch size where there are several, in place of the policy."""
    rows = ResultTable.load(run.table).rows
    learned = {row.workload: row.values["throughput"] for row in rows if row.method == LEARNED}
    lengths: dict[str, dict[int, int]] = {}
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.method != "fixed" or row.workload == ALL or not (stated := _LENGTH.fullmatch(row.rule)):
            continue
        name, _, size = row.workload.rpartition(" x ")
        if not (name and size.isdigit()):
            name, size = row.workload, "1"
        speed = row.values["throughput"]
        lengths.setdefault(name, {})[int(size)] = int(stated[1]) if speed > 1 else 0
        notes.setdefault(name, []).append(f"{speed:.2f} (the policy {learned[row.workload]:.2f}) at batch size {size}")
    for name, by_size in lengths.items():
        first = by_size[min(by_size)]
        note = (
            f"{engine} takes no policy that stops drafts token by token. Written is the best fixed length on the "
            f"training prompts, with this throughput on held-out ones (plain decoding: 1): {', '.join(notes[name])}."
        )
        schedule = by_size if len(by_size) > 1 else {}
        yield _of_pair(name, {"draft_length": first}, None, note, schedule=schedule)


def _of_recommendation(path: Path, engine: str) -> Item:
    content = read_json(path, "make the recommendation again")
    kinds = (OF_ENGINE, OF_EXACT, OF_DECODER)
    if content.get("format") not in kinds:
        raise RunFileError(f"{path} holds no recommendation ({', '.join(kinds)})")
    try:
        if content["format"] == OF_ENGINE:
            return _of_engine(content, engine)
        knobs, name = content["recommended"], str(content["workload"])
        if content["format"] == OF_EXACT:
            measured = content["engine"]
            note = f"Recommended for {measured}" + (", whose stop rule it was measured with." if knobs else ".")
            return _of_pair(name, knobs, ENGINE_SETTINGS[measured].stop, note)
        known = set(knobs or content["expected"]["knobs"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFileError(f"{path} is damaged ({error!r}); make the recommendation again") from error
    if not known <= _CHAIN:
        raise _refusal(engine, "", sorted(known), {}, str(path))
    return _of_pair(name, knobs, None, "Recommended by a run of --tuner.")


def _of_engine(content: Mapping[str, Any], engine: str) -> Item:
    """The setting that a live engine was tuned to; in its own terms for the same engine."""
    tuned, knobs = str(content["engine"]), content["recommended"]
    same = tuned == engine
    setting = ServedSetting(
        str(content["target"]),
        content["draft"],
        int(content["draft_length"]),
        float(content["stop_threshold"]) if content["draft"] != LOOKUP else 0.0,
        temperature=float(content.get("temperature", 0.0)),
        rule=None if same else ENGINE_SETTINGS[tuned].stop,
        extra=knobs if same and knobs else {},
    )
    if not knobs:
        note = f"On {tuned} nothing paid."
    elif same:
        note = "Measured on this engine."
    else:
        note = f"Measured on {tuned}, as whose files the models are named; measure it here before you serve with it."
    return Item(Path(str(content["target"])).stem, setting, note)


def _of_pair(name: str, knobs: Mapping[str, float] | None, rule: Any, note: str, **more: Any) -> Item:
    """A setting of one of our workloads; plain decoding where there are no knobs."""
    chosen = workload(name)
    try:
        setting = setting_of_pair(
            str(chosen.pair),
            knobs or {"draft_length": 0},
            temperature=chosen.sampling.temperature,
            rule=rule if knobs and knobs.get("stop_threshold") else None,
            **more,
        )
    except ArgumentError as error:
        return Item(name, error)
    return Item(name, setting, note)


def _refusal(engine: str, decoder: str, knobs: list[str], options: Mapping[str, Any], origin: str) -> SettingsError:
    """Words on settings that engines have no equivalent of: what they are, and what to learn instead."""
    docs = {}
    if decoder:
        try:
            docs = {knob.name: knob.doc for knob in traits_of(decoder).knobs_without_pair(**options)}
        except ValueError:  # knobs that depend on the pair
            docs = {}
    stated = "; ".join(f"{name}: {docs[name]}" if docs.get(name) else name for name in knobs or docs)
    of_decoder = f" of the {decoder} decoder" if decoder else ""
    exact = environment_id(SpeculativeDecoder.name)
    return SettingsError(
        f"{origin} has settings{of_decoder}, and {engine} has nothing that they could be written as ({stated}). "
        f"Engines decode exactly, with chains of drafted tokens: learn those with python train.py --env {exact}, or "
        "have a pair's measured with python evaluate.py --pair target+draft --engine ..., and export that"
    )
