"""Recommended settings of exact decoding: from the measurements to the advice, the file and the engine's arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.agents import save_settings
from specgym.agents.command_line import EngineName, evaluate_command
from specgym.agents.experiments.tune_worlds_settings import WorldsSettings
from specgym.agents.export import recommend_exact as recommending
from specgym.agents.export import worlds_policy
from specgym.agents.export.recommend_exact import recommend_exact, usual_setting
from specgym.decoding import ENGINE_SETTINGS
from specgym.envs import Facts, Readings, profile_of, workload

Shown = Callable[[], str]
FACTS = Facts(np.array([False]), np.array([False]), np.zeros(1), np.ones(1, np.int64), np.array([1.4]), np.array([2.2]))


class Follower:
    """A policy that takes the predicted length with a threshold of about 0.3, and may stop.

    Args:
        stops: whether it stops after the first measurement.
    """

    def __init__(self, stops: bool = False) -> None:
        self.stops = stops

    def actions(self, observations: NDArray[np.float32]) -> NDArray[np.floating]:
        """Return the same action for all."""
        return np.tile(np.array([[0.0, 0.25, 1.0 if self.stops else -1.0]], np.float32), (len(observations), 1))


class Fixed:
    """A world in which every setting has the same speedup and keeps every second token.

    Args:
        speedup: of all settings.
    """

    engine, backend, threshold = "transformers", "live", True

    def __init__(self, speedup: float) -> None:
        self.workload, self.facts, self.speedup = workload("tiny/prose"), FACTS, speedup
        self.profile = profile_of(self.workload, None, replayed=True)
        self.measured: list[int] = []

    def __len__(self) -> int:
        return 1

    def measure(self, setting: int) -> Readings:
        """Count a measurement."""
        self.measured.append(setting)
        drafts = np.zeros((1, 17), np.int64)
        drafts[0, 2] = 10
        kept, reached = np.zeros((2, 1, 16), np.int64)
        kept[0, 0], reached[0, :2] = 5, (10, 5)
        levels = np.full((1, 5), 3)
        return Readings(np.array([self.speedup]), drafts, kept, reached, levels, levels, np.array([1.0]))


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known policy in place of the one that ships."""
    monkeypatch.setattr(worlds_policy, "shipped_tuner", Follower)


@pytest.mark.parametrize("speedup", [1.3, 1.0, 0.8])
def test_what_is_recommended_was_measured_and_pays_or_the_advice_is_not_to_speculate(
    speedup: float, tmp_path: Path
) -> None:
    world = Fixed(speedup)
    recommendation = recommend_exact(Follower(), world, 3)
    recommendation.save(tmp_path / "recommendation.json", "command")
    stored = json.loads((tmp_path / "recommendation.json").read_text())
    assert len(stored["tried"]) == 3
    assert stored["tried"][0]["kept_by_place"] == [0.5, 0.0, None, None, None, None]
    assert stored["tried"][0]["tokens_per_round"] == pytest.approx(1.5)
    assert stored["expected"]["speedup"] == pytest.approx(speedup)
    pays = speedup > 1
    assert stored["recommended"] == (stored["expected"]["knobs"] if pays else None)
    assert ("num_assistant_tokens" in stored["arguments"]) == pays
    assert ("Do not speculate" in stored["advice"]) != pays
    assert stored["closed_form"]["stop_threshold"] == 0


def test_a_policy_may_stop_early_and_is_measured_no_more_than_it_says() -> None:
    world = Fixed(1.2)
    assert len(recommend_exact(Follower(stops=True), world, 4).tried) == 1
    assert len(world.measured) <= 2  # with the one of what is recommended
    assert "Stopped after 1" in str(recommend_exact(Follower(stops=True), Fixed(1.2), 4).render().caption)
    with pytest.raises(ValueError, match="measurements must be a whole number from 1 to"):
        recommend_exact(Follower(), world, 0)


@pytest.mark.parametrize("engine", get_args(EngineName))
@pytest.mark.usefixtures("shipped")
def test_a_pair_is_tuned_without_a_run_for_every_engine(engine: str, tmp_path: Path, shown: Shown) -> None:
    words = ["--pair", "tiny-3m-1l", "--engine", engine, "--measurements", "2", "--out", str(tmp_path)]
    assert evaluate_command(words) == 0
    said = shown()
    stored = json.loads((tmp_path / "recommendation.json").read_text())
    assert (stored["backend"], stored["engine"], len(stored["tried"])) == ("replay", engine, 2)
    assert f"tiny-3m-1l/prose, {engine} (replay)" in said
    assert stored["advice"] in said
    assert " ".join(stored["arguments"].split()) in said
    if stored["recommended"] is not None:
        length = int(stored["recommended"]["draft_length"])
        names = [name for knob, name in ENGINE_SETTINGS[engine].settings.items() if knob in stored["recommended"]]
        assert all(name in stored["arguments"] for name in names)
        assert str(length) in stored["arguments"]


@pytest.mark.usefixtures("shipped")
def test_a_pair_that_nobody_recorded_is_decoded_and_confirmed_by_the_clock(
    small_workloads: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    pair, _, prompts = small_workloads[0].rpartition("/")
    words = ["--pair", pair, "--prompts", prompts, "--measurements", "1", "--live", "--out", str(tmp_path / "out")]
    assert evaluate_command(words) == 0
    said = shown()
    assert "decoded live" in said
    for method in ("plain", "default", "closed form", "learned"):
        assert method in said
    assert json.loads((tmp_path / "out" / "recommendation.json").read_text())["backend"] == "live"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the folder of a run, or a pair"),
        (["--transfer"], "name the folder of a run, or a pair"),
        (["--pair", "tiny-10m"], "the pair tiny-10m has no draft"),
        (["--pair", "tiny", "--measurements", "9"], "measurements must be a whole number from 1 to 8"),
        (["--engine", "vllm"], "name the folder of a run, or a pair"),
        (["RUN", "--pair", "tiny", "--engine", "vllm"], "--engine and --out are for --pair without a run"),
        (["RUN", "--out", "here"], "--engine and --out are for --pair without a run"),
    ],
)
@pytest.mark.usefixtures("shipped")
def test_what_cannot_be_recommended_is_refused_in_one_line(
    words: list[str], message: str, shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(__file__).parents[2] / "fixtures" / "runs" / "tuner"
    monkeypatch.chdir(tmp_path)
    assert evaluate_command([str(run) if word == "RUN" else word for word in words]) == 2
    assert message in shown()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "empty.txt"], "empty.txt has 0 different prompts"),
        (["--measurements", "9"], "measurements must be a whole number from 1 to 8"),
        (["--out", "empty.txt"], "empty.txt"),
        (["--out", "empty.txt/out"], "empty.txt"),
    ],
)
@pytest.mark.usefixtures("shipped")
def test_what_cannot_be_recommended_is_refused_before_anything_is_timed(
    words: list[str], message: str, shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recommending, "real_world", lambda *arguments: pytest.fail("a pair was loaded and timed"))
    (tmp_path / "empty.txt").touch()
    assert evaluate_command(["--pair", "tiny", *words]) == 2
    assert message in shown()


def test_an_engine_s_own_setting_has_a_threshold_only_where_drafts_can_be_unsure() -> None:
    engines: dict[str, Any] = {engine: usual_setting(engine, True) for engine in ENGINE_SETTINGS}
    assert engines["transformers"] == {"draft_length": 20, "stop_threshold": 0.4}
    assert usual_setting("transformers", False) == {"draft_length": 5}
    assert usual_setting("vllm", False) == engines["vllm"] == {"draft_length": 5}


def test_with_a_run_its_own_policy_recommends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown) -> None:
    run, loaded = tmp_path / "mine", list[Path]()
    run.mkdir()
    save_settings(WorldsSettings(name="mine", runs=tmp_path), run / "settings.json", "command")

    def load(folder: Path) -> Follower:
        loaded.append(folder)
        return Follower()

    monkeypatch.setattr(worlds_policy.WorldsTuner, "load", load)
    words = ["--pair", "tiny-3m-lookup", "--measurements", "1", "--out", str(tmp_path / "out")]
    assert evaluate_command([str(run), *words]) == 0
    assert loaded == [run]
    assert "tiny-3m-lookup/prose, transformers (replay)" in shown()
    assert evaluate_command([str(run), "--live"]) == 2
    assert "--live needs --pair" in shown()
