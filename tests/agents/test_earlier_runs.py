"""Runs that earlier versions wrote: their settings load, they are resumed, and judged as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specgym.agents import (
    KnobSettings,
    ResultTable,
    RunSettings,
    StopSettings,
    TunerSettings,
    default_settings,
    load_settings,
    save_settings,
    tuner_settings,
)
from specgym.agents.command_line import evaluate_command, train_command
from tests.helpers.sealing import reseal

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
DECODERS = {
    "thresholds": "threshold",
    "lookahead": "lookahead",
    "medusa": "medusa",
    "medusa-typical": "medusa-typical",
    "draft-tree": "draft-tree",
}
JUDGED = ("thresholds", "lookahead", "medusa-typical", "stopping", "tuner")


@pytest.mark.parametrize("name", DECODERS)
def test_settings_say_which_decoder_was_tuned(name: str) -> None:
    settings = load_settings(RUNS / name / "settings.json")
    assert settings.decoder == DECODERS[name]
    assert (settings.environment.max_new_tokens, settings.evaluation.max_new_tokens) == (8, 8)
    if name == "thresholds":
        assert settings.decoder_options == {"max_draft_length": 4, "stop": "never"}
        assert (settings.bound, settings.reward.acceptance_weight, settings.reward.range_weight) == (None, 0.5, 4.0)
    if name == "medusa-typical":
        assert settings.max_divergence == settings.reward.max_divergence == 0.1
        assert settings.reward.acceptance_weight == settings.reward.range_weight == 0  # a bound put them out of effect
    assert settings.seeds == (0,)
    assert settings.max_prompt_tokens == 128  # as all prompts were cut, without an option
    stored = json.loads((RUNS / name / "settings.json").read_text())["settings"]
    assert settings.practising == (stored["environments"] or len(settings.workloads))
    assert settings.environment.prompts_per_step == 1


@pytest.mark.parametrize("name", JUDGED)
def test_a_run_is_resumed_and_its_table_made_again(
    name: str, tmp_path: Path, shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    run = tmp_path / name
    shutil.copytree(RUNS / name, run)
    assert train_command(["--resume", str(run)]) == 0
    assert "steps are done" in shown()
    assert evaluate_command([str(run)]) == 0
    text = shown()
    # Arithmetic differs between processors, so a figure may differ where the two best tokens are as good as equal.
    assert "equal those in" in text or "differ from" in text
    rows = ResultTable.load(run / "table.json").rows
    again = [(row.workload, row.method) for row in ResultTable.load(run / "evaluation.json").rows]
    # Later versions compare with more methods.
    assert [row for row in again if row in {(row.workload, row.method) for row in rows}] == [
        (row.workload, row.method) for row in rows
    ]


def test_a_run_can_be_prolonged(tmp_path: Path, shown: Callable[[], str]) -> None:
    run = tmp_path / "lookahead"
    shutil.copytree(RUNS / "lookahead", run)
    assert train_command(["--resume", str(run), "--total-timesteps", "80"]) == 0
    assert "Going on from step 40." in shown()


def test_thresholds_that_had_narrower_ranges_are_judged_but_do_not_go_on(
    tmp_path: Path, shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "thresholds"
    shutil.copytree(RUNS / "thresholds", run)
    assert train_command(["--resume", str(run), "--total-timesteps", "80"]) == 2
    text = shown()
    assert "policy.zip was learned by an earlier version" in text
    assert "start a new one with the command in its settings.json" in text


def test_a_tuner_of_an_earlier_version_is_what_it_was() -> None:
    settings = load_settings(RUNS / "tuner" / "settings.json")
    assert isinstance(settings, TunerSettings)
    assert settings.options == {"max_draft_length": 16, "stop": "never"}
    assert (settings.max_divergence, settings.seed) == (None, 0)
    assert (settings.reward.acceptance_weight, settings.reward.range_weight) == (0.5, 4.0)


def of_format_2(path: Path, kind: RunSettings, **changes: Any) -> RunSettings:
    """Settings as the version before wrote them, read."""
    save_settings(kind, path, "python train.py")
    content = json.loads(path.read_text())
    del content["sha256"]
    settings = content["settings"]
    if "seeds" in settings and "environment" in settings:
        settings["seed"] = settings.pop("seeds")[0]
        del settings["environment"]["prompts_per_step"]
    for options in (settings.get("environment", {}).get("decoder_options", {}), settings.get("decoder_options", {})):
        options.pop("stop", None)
    for key, value in changes.items():
        inner = settings
        *folders, last = key.split(".")
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    path.write_text(json.dumps({**content, "format": "specgym-settings-2"}))
    return load_settings(path)


WEIGHTS = {"environment.reward.acceptance_weight": 0.5, "environment.reward.range_weight": 4.0}


def test_settings_of_format_2_have_one_seed_no_bound_and_drafts_that_never_end_early(tmp_path: Path) -> None:
    live = default_settings("threshold", seeds=(3,), max_divergence=None, environment={"backend": "live"})
    settings = of_format_2(tmp_path / "settings.json", live, **WEIGHTS)
    assert isinstance(settings, KnobSettings)
    assert settings.seeds == (3,)
    assert settings.bound is None
    assert settings.decoder_options == {"max_draft_length": 16, "stop": "never"}
    assert settings.environment.prompts_per_step == 1
    assert settings.practising == len(settings.workloads)
    assert (settings.reward.acceptance_weight, settings.reward.range_weight) == (0.5, 4.0)
    again = tmp_path / "again.json"
    save_settings(settings, again, "python train.py")
    assert load_settings(again) == settings


def test_settings_of_format_2_under_a_bound_were_for_speed_alone(tmp_path: Path) -> None:
    settings = of_format_2(tmp_path / "knobs.json", default_settings("threshold", max_divergence=0.1), **WEIGHTS)
    tuner = of_format_2(
        tmp_path / "tuner.json",
        tuner_settings("threshold", max_divergence=0.1),
        **{"reward.acceptance_weight": 0.5, "reward.range_weight": 4.0},
    )
    assert isinstance(settings, KnobSettings)
    assert isinstance(tuner, TunerSettings)
    assert tuner.options["stop"] == "never"
    for reward in (settings.reward, tuner.bounded_reward):
        assert (reward.max_divergence, reward.speed_weight) == (0.1, 1)
        assert reward.acceptance_weight == reward.range_weight == 0


@pytest.mark.parametrize("usual", [default_settings("speculative"), tuner_settings("speculative")])
def test_exact_decoding_of_an_earlier_version_has_the_single_knob_that_it_had(
    tmp_path: Path, usual: RunSettings
) -> None:
    path = tmp_path / "settings.json"
    save_settings(usual, path, "python train.py")
    assert load_settings(path) == usual
    settings = json.loads(path.read_text())["settings"]
    holder = settings.get("environment", settings)
    assert holder["decoder_options"].pop("stop") == "transformers"
    reseal(path, settings=settings)
    earlier: Any = load_settings(path)
    options = earlier.options if isinstance(earlier, TunerSettings) else earlier.decoder_options
    assert options == {"max_draft_length": 16, "stop": "never"}
    assert [knob.name for knob in earlier.traits.knobs_without_pair(**options)] == ["draft_length"]


@pytest.mark.parametrize("decoder", ["lookahead", "threshold"])
def test_settings_of_format_2_practised_on_32_replays_a_workload(tmp_path: Path, decoder: str) -> None:
    usual = default_settings(decoder)
    settings = of_format_2(tmp_path / "settings.json", usual, environments=0)
    assert isinstance(settings, KnobSettings)
    assert settings.practising == 32 * len(usual.workloads)
    fewer = of_format_2(tmp_path / "fewer.json", usual, environments=len(usual.workloads))
    assert isinstance(fewer, KnobSettings)
    assert fewer.practising == len(usual.workloads)


def test_settings_of_format_2_of_stop_rules_stay_as_they_are(tmp_path: Path) -> None:
    usual = StopSettings(seeds=(0, 4), workloads=("tiny-3m-1l/prose",))
    assert of_format_2(tmp_path / "settings.json", usual) == usual


def test_a_live_table_of_stop_rules_is_read() -> None:
    rows = ResultTable.load(RUNS / "stopping" / "live.json").rows
    assert {"replayed", "charged", "clock"} <= set(rows[0].values)
    assert rows[1].rule
