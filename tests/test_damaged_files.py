"""Damaged files of every format: the same result, or one error of this package that names the file; nothing else."""

from __future__ import annotations

import functools
import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgym.agents import ExportedPolicy, ResultTable, load_knobs, load_settings, save_settings
from specgym.agents.export.stop_rule import ExportedStopRule
from specgym.callbacks.checkpoints import CheckpointError, read_checkpoint
from specgym.decoding import (
    LanguageModel,
    LatencyProfile,
    MedusaHeads,
    MixedProfile,
    NGramDrafter,
    SpecgymError,
    load_heads,
)
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment
from specgym.decoding.decoders.draft_tree.files import load_acceptance, load_alignment, save_acceptance, save_alignment
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, PredictorShape
from specgym.decoding.decoders.medusa.files import save_heads
from specgym.decoding.loading.checkpoint import load_checkpoint, save_checkpoint
from specgym.envs import MixedTrace, Outcomes, Trace
from tests.helpers.damage import change_array, change_tensor, cut, flip, reseal, swap
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "tests" / "fixtures" / "runs"
STEP = "checkpoints/step_000000040"
MUTATIONS = 30
LARGEST_GROWTH = 400_000
"""Kilobytes by which the most memory ever used may grow while a damaged file is read."""
CURRENT = {"specgym-policy-1": 2, "specgym-stop-rule-1": 2, "specgym-knobs-1": 2, "specgym-table-1": 2,
           "specgym-latency-3": 4, "specgym-checkpoint-1": 2}  # fmt: skip
"""Formats in the fixtures that had no checksum yet, and the version that has one."""


@dataclass(frozen=True)
class Format:
    """A format: the files that it has in a folder, how they are written, and what a reader makes of them."""

    files: tuple[str, ...]
    write: Callable[[Path], object]
    read: Callable[[Path], object]


def llama(layers: int, hidden: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@functools.cache
def target() -> LanguageModel:
    return LanguageModel(llama(2, 16, 0), prepack=False)


@functools.cache
def draft() -> LanguageModel:
    return LanguageModel(llama(1, 8, 1), prepack=False)


def smallest(kind: str) -> Path:
    return min((ROOT / "envs" / "data" / kind).glob("*.npz"), key=lambda path: path.stat().st_size)


def copied(source: Path, name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(source, folder / name)


def of_run(name: str, *files: str) -> Callable[[Path], object]:
    """Files of a run that an earlier version wrote, in the formats of this one."""

    def write(folder: Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RUNS / name / file, folder / file)
        for path in folder.rglob("*.json"):
            form = json.loads(path.read_text()).get("format")
            if path.name == "settings.json":
                save_settings(load_settings(path), path, "python train.py")
            elif form in CURRENT:
                beside = {"files": {"policy.safetensors": ""}} if path.name == "policy.json" else {}
                reseal(path, format=f"{form[:-1]}{CURRENT[form]}", **beside)

    return write


def fit_table(folder: Path) -> None:
    rng = random.Random(0)
    NGramDrafter.fit([[rng.randrange(50) for _ in range(200)]], 50).save(folder / "n.safetensors")


def fields_of(kind: type[Any], name: str) -> Callable[[Path], object]:
    return lambda folder: vars(kind.load(folder / name))


def weights_of(module: torch.nn.Module) -> object:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def write_model(folder: Path, eight_bits: bool) -> None:
    save_checkpoint(llama(2, 16, 0), folder, card="", eight_bits=eight_bits)


def write_heads(folder: Path) -> None:
    heads = MedusaHeads.for_target(target().model, 2)
    heads.accuracies = ((0.5, 0.25), (0.25,))
    save_heads(heads, folder, target())


MODEL = ("config.json", "generation_config.json", "model.safetensors", "specgym.json")
POLICY = ("policy.json", "policy.safetensors")
FORMATS = {
    "trace": Format(("t.npz",), copied(smallest("traces"), "t.npz"), fields_of(Trace, "t.npz")),
    "outcomes": Format(("o.npz",), copied(smallest("outcomes"), "o.npz"), fields_of(Outcomes, "o.npz")),
    "profile": Format(
        ("p.json",),
        copied(ROOT / "envs/data/latency/tiny-3m-1l.greedy.json", "p.json"),
        fields_of(LatencyProfile, "p.json"),
    ),
    "mixed trace": Format(
        ("m.npz",), lambda folder: made_up_mixed().save(folder / "m.npz"), fields_of(MixedTrace, "m.npz")
    ),
    "mixed profile": Format(
        ("m.json",),
        lambda folder: made_up_costs(made_up_mixed()).save(folder / "m.json"),
        fields_of(MixedProfile, "m.json"),
    ),
    "n-grams": Format(
        ("n.safetensors",), fit_table, lambda folder: NGramDrafter.load(folder / "n.safetensors").digest()
    ),
    "model": Format(
        MODEL, functools.partial(write_model, eight_bits=False), lambda folder: weights_of(load_checkpoint(folder))
    ),
    "int8": Format(
        MODEL, functools.partial(write_model, eight_bits=True), lambda folder: weights_of(load_checkpoint(folder))
    ),
    "heads": Format(
        ("medusa.json", "medusa.safetensors"), write_heads, lambda folder: weights_of(load_heads(folder, target()))
    ),
    "alignment": Format(
        ("alignment.json", "alignment.safetensors"),
        lambda folder: save_alignment(AffineAlignment(8, 16), folder, draft(), target()),
        lambda folder: weights_of(load_alignment(folder, draft(), target())),
    ),
    "acceptance": Format(
        ("acceptance.json", "acceptance.safetensors"),
        lambda folder: save_acceptance(
            AcceptancePredictor(PredictorShape(16, width=4)), folder, draft(), target(), AffineAlignment(8, 16)
        ),
        lambda folder: weights_of(load_acceptance(folder, draft(), target(), AffineAlignment(8, 16))),
    ),
    "policy": Format(POLICY, of_run("thresholds", *POLICY), lambda folder: vars(ExportedPolicy.load(folder))),
    "stop rule": Format(
        tuple(f"seed-0/{name}" for name in POLICY),
        of_run("stopping", *(f"seed-0/{name}" for name in POLICY)),
        lambda folder: ExportedStopRule.load(folder / "seed-0").weights,
    ),
    "knobs": Format(
        ("knobs.json",), of_run("thresholds", "knobs.json"), lambda folder: load_knobs(folder / "knobs.json")
    ),
    "table": Format(
        ("table.json",),
        of_run("thresholds", "table.json"),
        lambda folder: ResultTable.load(folder / "table.json").to_json(),
    ),
    "settings": Format(
        ("settings.json",),
        of_run("lookahead", "settings.json"),
        lambda folder: load_settings(folder / "settings.json"),
    ),
    "checkpoint": Format(
        tuple(f"{STEP}/{path.name}" for path in sorted((RUNS / "lookahead" / STEP).iterdir())),
        of_run("lookahead", *(f"{STEP}/{path.name}" for path in (RUNS / "lookahead" / STEP).iterdir())),
        lambda folder: vars(read_checkpoint(folder / STEP)) | {"folder": None},
    ),
}  # fmt: skip


def same(first: Any, second: Any) -> bool:
    """Equality to the bit, also of arrays and of what is no number."""
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.dtype == second.dtype and first.tobytes() == second.tobytes()
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dict__") and not isinstance(first, type):
        return type(first) is type(second) and same(vars(first), vars(second))
    return bool(first == second or (first != first and second != second))


def as_hostile(path: Path, rng: random.Random) -> None:
    """Change content, and make the checksums fit again, or leave them out as earlier versions did."""
    {".json": swap, ".npz": change_array, ".safetensors": change_tensor}.get(path.suffix, flip)(path, rng)
    description = next(iter(sorted(path.parent.glob("*.json"), key=lambda file: file.name in MODEL[:2])), None)
    if description is None:
        return
    try:
        reseal(description)
        content = json.loads(description.read_text(encoding="utf-8"))
        if rng.random() < 0.5 and (description.name == "specgym.json" or content["format"][-1:].isdigit()):
            del content["sha256"]
            content.pop("files", None) if description.name != "state.json" else None
            form = content.pop("format")
            if description.name != "specgym.json":
                content["format"] = f"{form[:-1]}{int(form[-1]) - 1}"
            description.write_text(json.dumps(content), encoding="utf-8")
    except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # what is left is no description any more


@pytest.fixture(scope="module", params=FORMATS)
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Format, Path]:
    folder = tmp_path_factory.mktemp("intact")
    FORMATS[request.param].write(folder)
    return FORMATS[request.param], folder


@pytest.mark.parametrize("hostile", [False, True], ids=["damaged", "hostile"])
@pytest.mark.filterwarnings("ignore")
def test_a_changed_file_is_read_alike_or_refused_by_name(
    intact: tuple[Format, Path], tmp_path: Path, hostile: bool
) -> None:
    form, folder = intact
    before = form.read(folder)
    refusals: dict[int, str] = {}
    for number in range(MUTATIONS):
        rng = random.Random(f"{form.files[0]} {hostile} {number}")
        changed = tmp_path / str(number)
        shutil.copytree(folder, changed)
        path = changed / rng.choice(form.files)
        if hostile:
            as_hostile(path, rng)
        else:
            rng.choice((flip, cut, swap) if path.suffix == ".json" else (flip, flip, cut))(path, rng)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            after = form.read(changed)
        except SpecgymError as error:
            refusals[number] = str(error)
        else:
            assert hostile or same(before, after), f"mutation {number} of {path.name} is believed"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < LARGEST_GROWTH, number
        shutil.rmtree(changed)
    assert refusals
    assert not {number: text for number, text in refusals.items() if str(tmp_path / str(number)) not in text}


@pytest.mark.parametrize(
    "name",
    ["trace", "outcomes", "profile", "mixed trace", "mixed profile", "n-grams", "policy", "knobs", "table", "settings"],
)
def test_a_file_of_this_version_without_its_checksum_is_refused(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    form.write(tmp_path)
    path = tmp_path / form.files[0]
    match path.suffix:
        case ".json":
            content = json.loads(path.read_text())
            del content["sha256"]
            path.write_text(json.dumps(content))
        case ".npz":
            arrays = dict(np.load(path))
            del arrays["sha256"]
            np.savez(path, **arrays)
        case _:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata()
            del metadata["sha256"]
            save_file(load_file(path), path, metadata)
    with pytest.raises(SpecgymError, match="its checksum is missing") as refused:
        form.read(tmp_path)
    assert str(path) in str(refused.value)


def test_recordings_and_tables_of_earlier_versions_load_without_a_checksum(tmp_path: Path) -> None:
    for name, earlier in (("trace", "specgym-trace-2"), ("outcomes", "specgym-outcomes-1")):
        form = FORMATS[name]
        form.write(tmp_path)
        before = form.read(tmp_path)
        arrays = dict(np.load(tmp_path / form.files[0]))
        del arrays["sha256"]
        metadata = json.loads(str(arrays["metadata"]))
        np.savez(
            tmp_path / form.files[0], **{**arrays, "metadata": np.array(json.dumps({**metadata, "format": earlier}))}
        )
        assert same(form.read(tmp_path), before)
    fit_table(tmp_path)
    path = tmp_path / "n.safetensors"
    before = NGramDrafter.load(path).digest()
    save_file(load_file(path), path, {"format": "specgym-ngram-1", "vocabulary_size": "50", "order": "4"})
    assert NGramDrafter.load(path).digest() == before
    save_checkpoint(llama(2, 16, 0), tmp_path, card="")
    (tmp_path / "specgym.json").write_text('{"tokenizer": null, "shared_with": null, "shared": null}')
    assert same(weights_of(load_checkpoint(tmp_path)), weights_of(llama(2, 16, 0).half().float()))


def test_random_states_that_are_none_are_refused(tmp_path: Path) -> None:
    FORMATS["checkpoint"].write(tmp_path)
    state = tmp_path / STEP / "state.json"
    whole = json.loads(state.read_text())["random"]
    name, keys, place, *rest = whole["numpy"]
    for changed in (
        {"numpy": [name, keys, 10**6, *rest]},
        {"numpy": [name, keys[:3], place, *rest]},
        {"python": [3, [1, 2], None]},
        {"torch": "AAAA"},
    ):
        reseal(state, random={**whole, **changed})
        with pytest.raises(CheckpointError, match=f"checkpoint {re.escape(str(state.parent))} is incomplete"):
            read_checkpoint(state.parent)
