"""`train.py --env specgym/Lookahead-v0` from the command line to the files, on a small recording of a random target."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import knob_grids as grids
from benchmarks import learned_against_grid as benchmark
from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.evaluation.live import CHARGED, Row
from specgym.agents.evaluation.results import rendered, verdict
from specgym.agents.experiments.tune_knobs import LookaheadSettings, load_settings
from specgym.agents.export.knob_policy import ExportedPolicy
from specgym.agents.training.run_folder import RunFolder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.outcomes import Outcomes, outcomes_name, totals
from tests.helpers.small_runs import options, record_little, target_alone

ENV = "specgym/Lookahead-v0"
KNOBS = ("window", "ngram", "guesses")
Shown = Callable[[], str]


@pytest.fixture(scope="module")
def workloads(small_workloads: tuple[str, str]) -> tuple[str, str]:
    """The target of the small workloads alone, greedy and sampled."""
    return target_alone(small_workloads)


@pytest.fixture(scope="module")
def recordings(workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outcomes of both workloads."""
    return record_little("lookahead", workloads, tmp_path_factory.mktemp("outcomes"))


@pytest.fixture(scope="module")
def finished(workloads: tuple[str, str], recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a few hundred steps."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert train_command(options(ENV, runs, workloads, recordings)) == 0
        yield runs / "mine"


def test_a_run_leaves_whole_numbers_a_policy_and_a_table(finished: Path, workloads: tuple[str, str]) -> None:
    stored = json.loads((finished / "knobs.json").read_text())
    assert list(stored["workloads"]) == list(workloads)
    for values in (*stored["workloads"].values(), *stored["pairs"].values()):
        assert tuple(values) == KNOBS
        assert all(type(value) is int for value in values.values())
    policy = ExportedPolicy.load(finished)
    assert [knob.name for knob in policy.knobs if knob.integer] == list(KNOBS)
    assert policy.state == (*KNOBS, *(f"workload/{name}" for name in workloads))
    rows = json.loads((finished / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["autoregressive", "default", "learned"] * 3
    assert {row["divergence"] for row in rows} == {0}
    assert [row["target_tokens_per_token"] for row in rows if row["method"] == "autoregressive"] == [1, 1, 1]
    assert rows[1]["knobs"] == {"window": 5, "ngram": 3, "guesses": 5}
    assert rows[1]["target_tokens_per_token"] > 1
    assert rows[1]["reward"] == pytest.approx(rows[1]["speedup"])
    assert type(load_settings(finished / "settings.json")) is LookaheadSettings


def test_what_was_done_is_logged_by_knob_and_workload(finished: Path, workloads: tuple[str, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(finished / "tensorboard")).Reload().Tags()["scalars"]
    for knob in KNOBS:
        assert {f"knobs/{knob}", f"policy/{knob}_std", f"workload/{workloads[1]}/knobs/{knob}"} <= set(tags)
    assert "eval/mean_reward" in tags


def test_evaluated_again_the_charged_numbers_are_the_same(finished: Path, shown: Shown) -> None:
    assert evaluate_command([str(finished)]) == 0
    told = shown()
    assert "All charged numbers equal" in told
    assert "Learned Lookahead knobs against the defaults" in told
    assert "The text is the target's own." in told


def test_a_finished_run_can_be_prolonged_and_nothing_else(finished: Path, shown: Shown, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    assert train_command(["--resume", str(run)]) == 0
    assert "All 320 steps are done" in shown()
    assert train_command(["--resume", str(run), "--total-timesteps", "400"]) == 0
    assert "Going on from step 320." in shown()
    assert json.loads((run / "table.json").read_text())["command"] == json.loads(
        (run / "settings.json").read_text()
    )["command"]  # fmt: skip
    assert train_command(["--resume", str(run), "--environment.tokens-per-step", "4"]) == 2
    assert "cannot go on with 4" in shown()
    assert train_command(["--env", "specgym/Thresholds-v0", "--resume", str(run)]) == 2
    assert "is a run of --env specgym/Lookahead-v0, not of --env specgym/Thresholds-v0; leave that out" in shown()


def test_the_report_has_no_place_for_pairs_of_thresholds(finished: Path) -> None:
    assert evaluate_command([str(finished), "--report"]) == 0
    page = (finished / "report.html").read_text()
    assert "Lookahead knobs learned in mine" in page
    assert "Window in use" in page
    assert "tokens read per token" in page
    for absent in ("Reward by threshold", "Patterns of good thresholds", "Workloads that training never saw"):
        assert absent not in page
    assert not (finished / "heat_maps.json").exists()
    assert not (finished / "report" / "heat_maps.csv").exists()
    assert (finished / "report" / "recommended.csv").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--max-divergence", "0.1"], "Unrecognized options: --max-divergence"),
        (["--environment.draft-length", "4"], "Unrecognized options: --environment.draft-length"),
        (["--environment.reward.max-divergence", "0.1"], "no divergence to weigh or to bound"),
        (["--environment.recordings", "nowhere"], "nowhere has no"),
        (["--environment.tokens-per-step", "13"], "have texts of 12 tokens; ask for fewer, or record longer ones"),
    ],
)
def test_what_does_not_apply_is_one_message_and_leaves_no_folder(
    wrong: list[str], message: str, workloads: tuple[str, str], recordings: Path, tmp_path: Path, shown: Shown
) -> None:
    arguments = [*options(ENV, tmp_path / "runs", workloads, recordings), *wrong]
    try:
        code = train_command(arguments)
    except SystemExit as ended:  # what the parser itself refuses
        code = int(str(ended.code))
    assert code == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()


def test_the_table_names_the_decoder_s_knobs_and_what_it_reads() -> None:
    values = dict.fromkeys((*CHARGED, "wall_ms_per_token", "wall_speedup"), 2.0) | {"divergence": 0.0}
    rows = [
        Row("a/prose", method, knobs, values | {"target_tokens_per_token": 12.5}, {})
        for method, knobs in (("default", {"window": 5, "guesses": 7}), ("learned", {"window": 2, "guesses": 11}))
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(rendered(rows, "Held-out prompts"))
    text = console.export_text()
    assert "2, 11" in text
    assert "tokens read" in text
    assert "12.50" in text
    assert "diver-" not in text
    assert "fallback" not in text
    assert "Learned such against the defaults" in verdict(rows, "such")


def test_workloads_may_have_weights_and_one_may_stand_alone(
    workloads: tuple[str, str], recordings: Path, tmp_path: Path
) -> None:
    assert train_command([*options(ENV, tmp_path, workloads, recordings), "--weights", "3", "1"]) == 0
    assert train_command([*options(ENV, tmp_path, workloads[:1], recordings, **{"--name": "alone"})]) == 0
    described = json.loads((tmp_path / "alone" / "policy.json").read_text())
    assert described["state"] == list(KNOBS)  # a workload alone needs no mark
    assert [knob["logarithmic"] for knob in described["knobs"]] == [True, False, True]


def test_the_grid_is_compared_once_with_what_was_learned(
    finished: Path, workloads: tuple[str, str], recordings: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        str(finished), "--prompts", "1", "--finalists", "2", "--final-prompts", "2", "--tokens", "8",
        "--window", "1", "4", "--ngram", "2", "3", "--guesses", "3",
    ]  # fmt: skip
    assert benchmark.main(asked) == 0
    said = shown()
    assert "of the grid's best learned on" in said
    assert "fastest recorded" in said
    (file,) = finished.glob(benchmark.FILE.format("*"))
    stored = json.loads(file.read_text())["workloads"]
    assert list(stored) == list(workloads)
    learned = json.loads((finished / "knobs.json").read_text())["workloads"]
    settings = load_settings(finished / "settings.json")
    profiles = dict(zip(workloads, RunFolder(finished).profile_paths(settings), strict=True))
    table = {
        (row["workload"], row["method"]): row["reward"]
        for row in json.loads((finished / "table.json").read_text())["rows"]
    }
    for name, found in stored.items():
        assert len(found["grid"]) == 4
        best_two = grids.best_apart([entry["reward"] for entry in found["grid"]], 2)
        assert [entry["knobs"] for entry in found["finalists"]] == [found["grid"][place]["knobs"] for place in best_two]
        assert found["best"]["reward"] == max(entry["reward"] for entry in found["finalists"])
        assert found["learned"]["knobs"] == learned[name]
        # The same prompts, tokens and seeds as the table's, and the same profile.
        for method in ("learned", "default"):
            assert found[method]["reward"] == pytest.approx(table[name, method])
        recording = Outcomes.load(recordings / outcomes_name(name, "lookahead", "train"))
        profile = LatencyProfile.load(profiles[name])
        seconds = totals(recording, profile.at(), settings.environment.tokens_per_step).per_token("seconds").tolist()
        assert list(found["recorded"]["knobs"].values()) == recording.settings[seconds.index(min(seconds))].tolist()

    def refuse(*arguments: object) -> list[float]:
        raise AssertionError("it was decoded before")

    monkeypatch.setattr(benchmark, "rewards", refuse)
    assert benchmark.main(asked) == 0
    assert json.loads(file.read_text())["workloads"] == stored
    with pytest.raises(AssertionError, match="decoded before"):
        benchmark.main([*asked[:-1], "4"])


def test_settings_that_the_grid_cannot_have_are_refused(finished: Path, shown: Shown) -> None:
    for wrong in (["--window", "17"], ["--guesses", "1.5"]):
        assert benchmark.main([str(finished), *wrong]) == 2
        assert "takes whole numbers from" in shown()
    assert benchmark.main([str(finished), "--workloads", "tiny/prose"]) == 2
    assert "has not tuned 'tiny/prose'" in shown()


def test_the_default_grid_is_thinned_evenly_and_what_is_given_stays(finished: Path) -> None:
    knobs = ExportedPolicy.load(finished).knobs
    values = grids.thinned(knobs, {})
    grid = grids.settings_of(values)
    assert 150 <= len(grid) <= grids.MOST
    for knob in knobs:
        assert (values[knob.name][0], values[knob.name][-1]) == (knob.low, knob.high)
        steps = [after - before for before, after in zip(values[knob.name], values[knob.name][1:], strict=False)]
        assert max(steps) - min(steps) <= 1
    given = grids.thinned(knobs, {"window": [3.0, 1.0, 3.0]})
    assert given["window"] == [1, 3]
    assert given["guesses"] == list(range(17))


def test_of_settings_that_earn_the_very_same_one_is_a_finalist() -> None:
    earned = [1.0, 1.2, 0.9, 1.2, 1.0, 1.2 + 1e-12, 1.1]
    assert grids.best_apart(earned, 3) == [1, 6, 0]
    assert grids.best_apart(earned, 9) == [1, 6, 0, 2]
