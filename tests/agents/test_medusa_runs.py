"""`train.py --env specgym/Medusa-v0` from the command line to the files, on small recordings of random heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.experiments.tune_knobs import MedusaSettings, load_settings
from specgym.agents.export.knob_policy import ExportedPolicy
from specgym.decoding import load_pair
from specgym.decoding.decoders.medusa.files import save_heads
from tests.helpers.small_medusa_heads import random_heads
from tests.helpers.small_runs import options, record_little, target_alone

ENV = "specgym/Medusa-v0"
KNOBS = ("heads", "tree_size")
HEADS = 3
BOUND = 0.02
Shown = Callable[[], str]


@pytest.fixture(scope="module")
def workloads(small_workloads: tuple[str, str]) -> tuple[str, str]:
    """Of the small target alone, with heads beside it, greedy and sampled."""
    name, sampled = target_alone(small_workloads)
    folder = Path(name.rpartition("/target/")[0]) / "target"
    target = load_pair(str(folder)).target
    save_heads(random_heads(target.model, HEADS, spread=0.05), folder.with_name("target-medusa"), target)
    return name, sampled


@pytest.fixture(scope="module")
def finished(workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a few hundred steps."""
    yield from run("medusa", workloads[0], tmp_path_factory)


@pytest.fixture(scope="module")
def typical(workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with typical acceptance, sampling, under a bound."""
    changed = {"--acceptance": "typical", "--max-divergence": BOUND}
    yield from run("medusa-typical", workloads[1], tmp_path_factory, **changed)


def run(decoder: str, name: str, folders: pytest.TempPathFactory, **changed: object) -> Iterator[Path]:
    runs = folders.mktemp("runs")
    recordings = record_little(decoder, [name], folders.mktemp("outcomes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGYM_CACHE", str(folders.mktemp("cache")))
        assert train_command(options(ENV, runs, [name], recordings, **changed)) == 0
        yield runs / "mine"


def test_a_run_learns_whole_numbers_within_what_the_target_has(finished: Path, workloads: tuple[str, str]) -> None:
    assert type(load_settings(finished / "settings.json")) is MedusaSettings
    policy = ExportedPolicy.load(finished)
    assert policy.state == KNOBS  # a workload alone needs no mark
    assert [(knob.high, knob.integer, knob.logarithmic) for knob in policy.knobs] == [
        (HEADS, True, False),
        (64, True, True),
    ]
    learned = json.loads((finished / "knobs.json").read_text())["workloads"][workloads[0]]
    assert tuple(learned) == KNOBS
    assert all(type(value) is int for value in learned.values())
    assert 0 <= learned["heads"] <= HEADS
    assert 0 <= learned["tree_size"] <= 64
    rows = json.loads((finished / "table.json").read_text())["rows"]
    plain, usual, chosen = rows[:3]
    assert [row["method"] for row in (plain, usual, chosen)] == ["autoregressive", "default", "learned"]
    assert {row["divergence"] for row in rows} == {0}
    assert plain["target_tokens_per_token"] == 1
    assert usual["knobs"] == {"heads": HEADS, "tree_size": 16}
    assert usual["target_tokens_per_token"] > 1
    assert chosen["knobs"] == learned


def test_evaluated_again_the_charged_numbers_are_the_same(finished: Path, shown: Shown) -> None:
    assert evaluate_command([str(finished)]) == 0
    told = shown()
    assert "All charged numbers equal" in told
    assert "Learned Medusa knobs against the defaults" in told


def test_typical_acceptance_learns_what_to_accept_under_a_bound(typical: Path, workloads: tuple[str, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = load_settings(typical / "settings.json")
    assert isinstance(settings, MedusaSettings)
    assert (settings.acceptance, settings.max_divergence) == ("typical", BOUND)
    policy = ExportedPolicy.load(typical)
    assert policy.state == (*KNOBS, "epsilon", "delta")
    learned = json.loads((typical / "knobs.json").read_text())["workloads"][workloads[1]]
    assert tuple(learned) == policy.state
    rows = json.loads((typical / "table.json").read_text())["rows"]
    plain, usual, chosen = rows[:3]
    assert plain["divergence"] == 0
    assert usual["divergence"] > BOUND
    assert usual["reward"] == pytest.approx(usual["speedup"] - (usual["divergence"] - BOUND))
    assert chosen["knobs"] == learned
    events = EventAccumulator(str(typical / "tensorboard")).Reload()
    assert max(event.value for event in events.Scalars("decoding/divergence")) > BOUND
    assert events.Scalars(f"bound/multiplier/{workloads[1]}")[-1].value != 1  # at first it is


def test_of_typical_acceptance_table_and_report_tell_how_far_it_strays(typical: Path, shown: Shown) -> None:
    assert evaluate_command([str(typical)]) == 0
    told = " ".join(shown().split())
    assert "All charged numbers equal" in told
    assert "Learned Medusa knobs against the defaults" in told
    assert f"The bound of {BOUND} on the divergence is kept" in told
    assert evaluate_command([str(typical), "--report"]) == 0
    page = (typical / "report.html").read_text()
    for expected in ("Epsilon in use", "Delta in use", "from the target (the defaults: "):
        assert expected in page


def test_typical_acceptance_of_greedy_texts_alone_is_refused_before_there_is_a_folder(
    workloads: tuple[str, str], tmp_path: Path, shown: Shown
) -> None:
    words = options(ENV, tmp_path / "runs", workloads[:1], None, **{"--acceptance": "typical"})
    assert train_command([*words, "--environment.backend", "live"]) == 2
    assert "every workload is greedy" in shown()
    assert not (tmp_path / "runs").exists()


def test_a_target_without_heads_is_one_message_that_says_how_to_train_some_and_leaves_no_folder(
    workloads: tuple[str, str], tmp_path: Path, shown: Shown
) -> None:
    folder, _, prompts = workloads[0].rpartition("/target/")
    shutil.copytree(Path(folder, "target"), tmp_path / "bare")
    words = options(ENV, tmp_path / "runs", [f"{tmp_path / 'bare'}/{prompts}"], None)
    assert train_command([*words, "--environment.backend", "live"]) == 2
    assert f"no Medusa heads ship for {tmp_path / 'bare'}" in shown()
    assert not (tmp_path / "runs").exists()


def test_the_report_is_about_heads_and_trees(finished: Path) -> None:
    assert evaluate_command([str(finished), "--report"]) == 0
    page = (finished / "report.html").read_text()
    for told in ("Medusa knobs learned in mine", "Heads in use", "Tree size in use", "tokens read per token"):
        assert told in page
