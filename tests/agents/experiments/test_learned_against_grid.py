"""The benchmark that compares learned knobs with a dense grid, on a small recording of a random target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import knob_grids as grids
from benchmarks import learned_against_grid as benchmark
from specgym.agents import ExportedPolicy, RunFolder, load_settings
from specgym.agents.command_line import train_command
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.outcomes import Outcomes, outcomes_name, totals
from tests.helpers.small_runs import options, record_little, target_alone

ENV = "specgym/Lookahead-v0"
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
    knobs = json.loads((finished / "knobs.json").read_text())
    learned = {name: setting or knobs["rests"][name][0] for name, setting in knobs["workloads"].items()}
    settings = load_settings(finished / "settings.json")
    profiles = dict(zip(workloads, RunFolder(finished).profile_paths(settings.workloads), strict=True))
    table = {
        (row["workload"], row["method"]): row["reward"]
        for row in json.loads((finished / "table.json").read_text())["rows"]
    }
    for name, result in stored.items():
        assert len(result["grid"]) == 4
        best_two = grids.best_apart([entry["reward"] for entry in result["grid"]], 2)
        finalists = [entry["knobs"] for entry in result["finalists"]]
        assert finalists == [result["grid"][place]["knobs"] for place in best_two]
        assert result["best"]["reward"] == max(entry["reward"] for entry in result["finalists"])
        assert result["learned"]["knobs"] == learned[name]
        # The same prompts, tokens and seeds as the table's, and the same profile.
        for method in ("learned", "default") if knobs["workloads"][name] else ("default",):
            assert result[method]["reward"] == pytest.approx(table[name, method])
        recording = Outcomes.load(recordings / outcomes_name(name, "lookahead", "train"))
        profile = LatencyProfile.load(profiles[name])
        seconds = totals(recording, profile.at(), settings.environment.max_new_tokens).per_token("seconds").tolist()
        assert list(result["recorded"]["knobs"].values()) == recording.settings[seconds.index(min(seconds))].tolist()

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
    arguments = grids.thinned(knobs, {"window": [3.0, 1.0, 3.0]})
    assert arguments["window"] == [1, 3]
    assert arguments["guesses"] == list(range(17))


def test_of_settings_that_earn_the_very_same_one_is_a_finalist() -> None:
    earned = [1.0, 1.2, 0.9, 1.2, 1.0, 1.2 + 1e-12, 1.1]
    assert grids.best_apart(earned, 3) == [1, 6, 0]
    assert grids.best_apart(earned, 9) == [1, 6, 0, 2]
