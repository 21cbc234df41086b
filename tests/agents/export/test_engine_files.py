"""Exports of runs and recommendations: what engines can have is written, all else refused with the way to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from specgym.agents import save_settings
from specgym.agents.command_line import ExportName, evaluate_command
from specgym.agents.engines.settings import EXPERIMENT
from specgym.agents.evaluation.results import LEARNED, ResultTable, Row
from specgym.agents.experiments.control.choose_drafts_settings import ChoiceSettings
from specgym.agents.experiments.control.stop_drafts_settings import StopSettings
from specgym.agents.experiments.experiment import RunSettings
from specgym.agents.experiments.tune_knobs_settings import default_settings
from specgym.agents.experiments.tune_worlds_settings import WorldsSettings
from specgym.agents.export.engine_files import export_for_engine
from specgym.agents.export.recommend import save_knobs
from specgym.agents.training.settings_io import SETTINGS_FORMAT
from specgym.decoding import EXPORT_ENGINES, LOOKUP, write_sealed
from specgym.decoding.decoders.traits import SpeculativeOptions

Shown = Callable[[], str]
RUNS = Path(__file__).parents[2] / "fixtures" / "runs"


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    """A run that has learned settings of exact decoding for four workloads."""
    workloads = ("tiny/prose", "tiny/chat", "tiny-10m-lookup/code@0.7", "tiny-10m-ngram/prose")
    folder = tmp_path / "learned"
    folder.mkdir()
    save_settings(
        default_settings("speculative", workloads=workloads, name="learned", runs=tmp_path),
        folder / "settings.json",
        "command",
    )
    knobs: dict[str, Mapping[str, float] | None] = {
        key: {"draft_length": 6, "stop_threshold": 0.25} for key in workloads
    }
    knobs["tiny/chat"] = None
    save_knobs(folder / "knobs.json", {"pairs": {}, "workloads": knobs})
    return folder


def text(folder: Path) -> str:
    """Everything that was written."""
    return "\n".join(path.read_text() for path in sorted((folder / "export").rglob("*")) if path.is_file())


def store(folder: Path, **content: Any) -> Path:
    """A folder with a recommendation."""
    folder.mkdir(exist_ok=True)
    (folder / "recommendation.json").write_text(json.dumps(content))
    return folder


def test_every_engine_can_be_named() -> None:
    assert set(get_args(ExportName)) == set(EXPORT_ENGINES)


@pytest.mark.parametrize("engine", EXPORT_ENGINES)
def test_learned_settings_of_exact_decoding_are_written_workload_by_workload(
    engine: str, learned: Path, shown: Shown
) -> None:
    assert evaluate_command([str(learned), "--export", engine]) == 0
    said = shown()
    places = sorted(path.name for path in (learned / "export" / engine).iterdir())
    assert places == ["tiny-10m-lookup_code@0.7", "tiny_chat", "tiny_prose"]
    assert "decode with the target alone" in said  # where nothing pays
    assert "engines draft from no ngram table" in said
    assert "has no equivalent" in said  # the threshold of a copied draft, if nothing else
    written = text(learned)
    assert "tiny-10m-draft-1l" in written
    assert written.count(f"# For {engine} ") == 3
    if engine == "llama.cpp":
        assert "another rule (transformers)" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thresholds", ("fallback: largest distance", "--env specgym/Speculative-v0")),
        ("lookahead", ("window: columns", "--env specgym/Speculative-v0")),
        ("medusa", ("heads", "--env specgym/Speculative-v0")),
        ("draft-tree", ("--env specgym/Speculative-v0",)),
        ("tuner", ("fallback: largest distance", "--env specgym/Speculative-v0")),
    ],
)
def test_settings_of_other_decoders_are_refused_with_what_the_engine_lacks(
    name: str, words: tuple[str, ...], tmp_path: Path, shown: Shown
) -> None:
    run = tmp_path / name
    shutil.copytree(RUNS / name, run)
    assert evaluate_command([str(run), "--export", "vllm"]) == 2
    said = shown()
    assert "vllm has nothing that they could be written as" in said
    assert all(word in said for word in words)
    assert not (run / "export").exists()


def test_a_drafting_policy_is_replaced_by_the_best_fixed_length_and_the_loss_is_told(
    tmp_path: Path, shown: Shown
) -> None:
    run = tmp_path / "stopping"
    shutil.copytree(RUNS / "stopping", run)
    assert evaluate_command([str(run), "--export", "vllm"]) == 0
    said = shown()
    assert "no policy that stops drafts token by token" in said
    assert "1.85 (the policy 1.71) at batch size 1" in said
    config = run / "export" / "vllm" / "tiny-3m-1l_prose" / "speculative_config.json"
    assert json.loads(config.read_text())["num_speculative_tokens"] == 3


def test_a_choice_of_drafts_is_refused_with_where_the_best_rule_of_engines_stands(tmp_path: Path, shown: Shown) -> None:
    save_settings(ChoiceSettings(workloads=("tiny-3m-mixed/prose",)), tmp_path / "settings.json", "command")
    assert evaluate_command([str(tmp_path), "--export", "llama.cpp"]) == 2
    assert "says, as hybrid, by which fixed rule" in shown()
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            default_settings("speculative", environment={"decoder_options": SpeculativeOptions(stop="expected-gain")}),
            "does not weigh. Tune by a rule that engines have: python train.py --env specgym/Speculative-v0",
        ),
        (StopSettings(overlap="pipelined", shipped_latency=True), "they take turns. Learn without --overlap"),
    ],
)
def test_what_was_found_by_what_engines_lack_is_refused_with_what_to_learn_instead(
    settings: RunSettings, message: str, tmp_path: Path, shown: Shown
) -> None:
    save_settings(settings, tmp_path / "settings.json", "command")
    assert evaluate_command([str(tmp_path), "--export", "vllm"]) == 2
    assert message in shown()
    assert not (tmp_path / "export").exists()


def test_lengths_by_batch_size_become_a_schedule(tmp_path: Path) -> None:
    save_settings(StopSettings(batch_sizes=(1, 8, 32), environments=96), tmp_path / "settings.json", "command")
    rows = []
    for size, length, speed in ((1, 5, 1.6), (8, 2, 1.2), (32, 1, 0.9)):
        place = f"tiny/prose x {size}"
        rows.append(Row(place, "fixed", values={"throughput": speed}, rule=f"length {length}"))
        rows.append(Row(place, LEARNED, values={"throughput": speed}, rule="learned"))
    ResultTable(rows).save(tmp_path / "table.json", "command")
    export_for_engine(tmp_path, "vllm")
    config = json.loads((tmp_path / "export" / "vllm" / "tiny_prose" / "speculative_config.json").read_text())
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 1, 5], [2, 8, 2], [9, 32, 0]]


def test_recommendations_of_every_kind_are_written(tmp_path: Path, shown: Shown) -> None:
    exact = {"format": "specgym-exact-recommendation-1", "workload": "tiny/prose", "engine": "llama.cpp"}
    folder = store(tmp_path / "exact", **exact, recommended={"draft_length": 4, "stop_threshold": 0.5})
    export_for_engine(folder, "llama.cpp")
    assert "--spec-draft-p-min 0.5" in text(folder)
    export_for_engine(folder, "transformers")
    assert "another rule (llama.cpp)" in shown()
    export_for_engine(store(tmp_path / "plain", **exact, recommended=None), "vllm")
    assert "decode with the target alone" in text(tmp_path / "plain")

    decoder = {"format": "specgym-recommendation-1", "workload": "tiny/prose"}
    expected = {"knobs": {"draft_length": 4.0}}
    folder = store(tmp_path / "decoder", **decoder, recommended={"draft_length": 4}, expected=expected)
    export_for_engine(folder, "sglang")
    assert "--speculative-num-steps 4" in text(folder)
    lossy = {"knobs": {"fallback": 0.3}}
    folder = store(tmp_path / "lossy", **decoder, recommended=None, expected=lossy)
    assert evaluate_command([str(folder), "--export", "vllm"]) == 2
    assert "could be written as (fallback)" in shown()


def test_an_engine_s_own_run_is_written_in_its_terms_and_for_others_in_ours(tmp_path: Path, shown: Shown) -> None:
    tuned = {
        "format": "specgym-engine-recommendation-1",
        "engine": "openvino",
        "target": "models/target",
        "temperature": 0.0,
        "stop_threshold": 0.0,
    }
    folder = store(
        tmp_path / "copied",
        **tuned,
        draft=LOOKUP,
        draft_length=9,
        recommended={"num_assistant_tokens": 9.0, "max_ngram_size": 2.0},
    )
    export_for_engine(folder, "openvino")
    assert "num_assistant_tokens=9, max_ngram_size=2" in text(folder)
    export_for_engine(folder, "vllm")
    assert "Measured on openvino" in shown()
    assert '"num_speculative_tokens": 9' in text(folder)
    folder = store(tmp_path / "none", **tuned, draft="models/draft", draft_length=0, recommended=None)
    export_for_engine(folder, "openvino")
    assert "decode with the target alone" in text(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the folder of a run, or of a recommendation"),
        (["RUN", "--report"], "leave out all options but the folder"),
        (["EMPTY"], "nor has it a recommendation.json"),
        (["WORLDS"], "--pair target+draft writes the folder of a recommendation"),
        (["UNFINISHED"], "unfinished recommends nothing yet; go on with: python train.py --resume"),
        (["DAMAGED"], "is damaged"),
        (["OTHER"], "holds no recommendation"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    words: list[str], message: str, learned: Path, tmp_path: Path, shown: Shown
) -> None:
    for name in ("empty", "worlds", "unfinished"):
        (tmp_path / name).mkdir()
    begun = {"format": SETTINGS_FORMAT, "experiment": EXPERIMENT, "settings": {}}
    write_sealed(tmp_path / "unfinished" / "settings.json", begun)
    save_settings(WorldsSettings(name="worlds", runs=tmp_path), tmp_path / "worlds" / "settings.json", "command")
    places = {
        "RUN": learned,
        "EMPTY": tmp_path / "empty",
        "WORLDS": tmp_path / "worlds",
        "UNFINISHED": tmp_path / "unfinished",
        "DAMAGED": store(tmp_path / "damaged", format="specgym-exact-recommendation-1", workload="tiny/prose"),
        "OTHER": store(tmp_path / "other", format="specgym-something-1"),
    }
    assert evaluate_command([*(str(places.get(word, word)) for word in words), "--export", "vllm"]) == 2
    assert message in shown()
