"""`train.py --tuner` and `evaluate.py` from the command line to the files, on shipped traces."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.evaluation.replayed import Measurement, TuningTask
from specgym.agents.evaluation.unseen import cross_validation
from specgym.agents.experiments.experiment import load_settings
from specgym.agents.experiments.learned_tuner import LearnedSearcher, LearnedTuner, TuningSessions, practice
from specgym.agents.export.knob_policy import ExportedPolicy
from specgym.agents.export.recommend_pair import SHOWN, Recommendation
from specgym.agents.training.run_folder import RunFileError
from specgym.envs.tuning.reward import RewardSettings
from specgym.envs.tuning.vector_env import TuningVectorEnv
from tests.helpers.lost_workers import killed_worker, run_here

WORKLOADS = ("tiny-3m-ngram/prose", "tiny-3m-ngram/code", "tiny-3m-1l/prose", "tiny-3m-1l/code")
Shown = Callable[[], str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few hundred measurements."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_command([*options(folder)]) == 0
    return folder / "mine"


def options(runs: Path, **changed: object) -> list[str]:
    chosen = {
        "--runs": runs, "--name": "mine", "--total-timesteps": 288, "--environments": 8, "--measurements": 2,
        "--prompts-per-measurement": 2, "--learning.rollout-steps": 6, "--learning.batch-size": 48,
        "--learning.epochs": 2, "--checkpoint-every": 48, "--max-new-tokens": 16, **changed,
    }  # fmt: skip
    return ["--tuner", "--workloads", *WORKLOADS, *(str(word) for pair in chosen.items() for word in pair)]


def test_a_run_leaves_everything_that_its_folder_promises(finished: Path) -> None:
    assert load_settings(finished / "settings.json").workloads == WORKLOADS
    for name in ("policy.zip", "policy.safetensors", "policy.json", "heat_maps.json", "patterns.json", "patterns.csv"):
        assert (finished / name).stat().st_size > 0
    rows = json.loads((finished / "table.json").read_text())["rows"]
    assert len(rows) == 4 * (len(WORKLOADS) + 1)
    best = [row for row in rows if row["method"] == "best" and row["workload"] in WORKLOADS]
    assert [row["share_of_best"] for row in best] == pytest.approx([1.0] * 4)
    for row in rows:
        if row["intervals"]:
            low, high = row["intervals"]["speedup"]
            assert low <= row["speedup"] <= high
    thresholds = json.loads((finished / "knobs.json").read_text())
    assert set(thresholds["workloads"]) == set(WORKLOADS)
    assert set(thresholds["pairs"]) == {"tiny-3m-ngram", "tiny-3m-1l"}
    assert set(thresholds["universal"]) == {"fallback", "rollback"}


def test_evaluated_again_the_table_is_the_same(finished: Path, shown: Shown) -> None:
    assert evaluate_command([str(finished)]) == 0
    assert "All numbers equal those in" in shown()
    table, again = (json.loads((finished / name).read_text())["rows"] for name in ("table.json", "evaluation.json"))
    assert table == again


def test_a_resumed_run_goes_on_from_its_checkpoint_to_more_steps(finished: Path, tmp_path: Path, shown: Shown) -> None:
    run = tmp_path / "mine"
    shutil.copytree(finished, run)
    before = (run / "policy.safetensors").read_bytes()
    shown()
    assert train_command(["--resume", str(run), "--total-timesteps", "384"]) == 0
    assert "Going on from step 288" in shown()
    assert (run / "policy.safetensors").read_bytes() != before
    assert train_command(["--resume", str(run), "--seed", "5"]) == 2
    assert "seed = 0, and cannot go on with 5" in shown()


def test_a_finished_run_that_is_resumed_or_evaluated_keeps_its_files(
    finished: Path, tmp_path: Path, shown: Shown
) -> None:
    run = tmp_path / "mine"
    shutil.copytree(finished, run)
    kept = {file.name: file.stat().st_mtime_ns for file in run.iterdir() if file.is_file()}
    assert train_command(["--resume", str(run)]) == 0
    assert "makes it again" in shown()
    assert evaluate_command([str(run)]) == 0
    now = {file.name: file.stat().st_mtime_ns for file in run.iterdir() if file.is_file()}
    assert now.keys() - kept.keys() <= {"evaluation.json"}
    assert {name: now[name] for name in kept if name != "evaluation.json"} == {
        name: time for name, time in kept.items() if name != "evaluation.json"
    }


def test_a_tuner_with_every_option_learns_logs_and_resumes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = options(
        tmp_path,
        **{
            "--max-divergence": 0.1, "--learning.entropy-coefficient": 0.01, "--learning.entropy-end": 0.0,
            "--learning.plateau-patience": 1, "--learning.stop-patience": 50, "--learning.replay.updates": 2,
            "--learning.replay.segments-per-update": 4, "--learning.replay.warm-up": 1,
        },
    )  # fmt: skip
    assert train_command([*every, "--learning.workload-priorities"]) == 0
    run = tmp_path / "mine"
    tags = set(EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"])
    expected = {"replay/ratio_mean", "replay/effective_sample_size", "plateau/learning_rate", "entropy/coefficient"}
    expected |= {
        f"bound/multiplier/{WORKLOADS[0]}",
        "bound/kept",
        f"workload_priority/score/{WORKLOADS[0]}",
        "reward/total",
    }
    assert expected <= tags, expected - tags
    newest = max((run / "checkpoints").iterdir())
    assert {"prioritised_replay.npz", "plateau.json", "early_stop.json"} <= {file.name for file in newest.iterdir()}
    assert train_command(["--resume", str(run), "--total-timesteps", "336"]) == 0


def test_thresholds_are_recommended_for_a_pair_that_was_not_in_training(finished: Path, shown: Shown) -> None:
    assert evaluate_command([str(finished), "--pair", "tiny-3m-lookup", "--prompts", "chat"]) == 0
    said = shown()
    stored = json.loads((finished / "recommendations" / "tiny-3m-lookup_chat" / "recommendation.json").read_text())
    assert stored["backend"] == "replay"
    assert len(stored["tried"]) == 2
    if stored["expected"]["values"]["speedup"] > 1:
        assert "Recommended for tiny-3m-lookup/chat: fallback=" in said
        assert stored["recommended"] == stored["expected"]["knobs"]
        assert 0 <= stored["recommended"]["fallback"] <= 1
    else:
        assert "Do not speculate on tiny-3m-lookup/chat" in said
        assert stored["recommended"] is None


def test_a_recommendation_that_is_slower_than_plain_decoding_is_not_to_speculate(tmp_path: Path) -> None:
    knobs = {"fallback": 0.3, "rollback": 1.0}
    for speedup, advised in ((1.2, True), (1.0, False), (0.9, False)):
        expected = Measurement(knobs, dict.fromkeys(SHOWN, speedup), speedup)
        recommendation = Recommendation("a/prose", "replay", [], knobs, expected)
        recommendation.save(tmp_path / "recommendation.json", "command")
        stored = json.loads((tmp_path / "recommendation.json").read_text())
        assert stored["recommended"] == (knobs if advised else None)
        assert bool(recommendation.advice) != advised


def test_a_live_recommendation_measures_and_confirms_by_decoding(
    finished: Path, small_workloads: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    pair, _, prompts = small_workloads[0].rpartition("/")
    command = [str(finished), "--pair", pair, "--prompts", prompts, "--measurements", "1", "--live"]
    assert evaluate_command(command) == 0
    printed = shown()
    assert "(live)" in printed
    assert "decoded live" in printed
    assert "plain" in printed


def test_cross_validation_goes_on_where_it_was_interrupted(
    finished: Path, tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "mine"
    shutil.copytree(finished, run)
    command = [str(run), "--transfer", "--leave-out", "pair", "--seeds", "0", "--jobs", "1"]
    assert evaluate_command(command) == 0
    assert "One pair left out: after 2 measurements the learned tuner reaches" in shown()
    transfer = json.loads((run / "transfer.json").read_text())
    assert {fold["left_out"] for fold in transfer["folds"]} == {"tiny-3m-ngram", "tiny-3m-1l"}
    for fold in transfer["folds"]:
        trained = load_settings(run / "folds" / f"without-pair-{fold['left_out']}" / "seed-0" / "settings.json")
        assert trained.workloads
        assert not set(trained.workloads) & set(fold["workloads"])
    methods = {row["method"] for row in transfer["summary"]}
    assert {"learned", "universal", "tpe", "gp", "cma-es", "random", "sobol", "default"} <= methods
    policies = sorted(run.glob("folds/*/*/policy.zip"))
    written = [file.stat().st_mtime_ns for file in policies]
    monkeypatch.setattr(cross_validation, "run_tasks", run_here)  # a process of its own takes seconds to begin
    assert evaluate_command(command) == 0
    assert [file.stat().st_mtime_ns for file in policies] == written
    assert json.loads((run / "transfer.json").read_text())["results"] == transfer["results"]


def test_what_stands_in_the_way_of_a_cross_validation_is_named_before_anything_is_trained(
    finished: Path, tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "mine"
    shutil.copytree(finished, run)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert evaluate_command([str(run), "--transfer", "--leave-out", "family"]) == 2
    assert "leaving one family out needs workloads of at least two, got tiny-3m" in shown()
    assert evaluate_command([str(run), "--transfer", "--leave-out", "pair", "--jobs", "1"]) == 2
    assert 'pip install "specgym[tuning]"' in shown()
    assert not (run / "folds").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "tiny/prosa"], "Did you mean 'prose'"),
        (["--workloads", "tiny/prose", "--recordings", "nowhere"], "nowhere"),
        (["--environments", "2"], "environments must be a whole number from"),
        (["--weights", "1", "2"], "weights must be"),
        (["--max-divergence", "2"], "max_divergence must be a number above 0 and at most 1"),
        (["--max-divergence", "0"], "max_divergence must be a number above 0 and at most 1"),
        (["--reward.max-divergence", "0.1"], "give --max-divergence 0.1 instead"),
        (["--learning.replay.alpha", "-1"], "alpha must be"),
    ],
)
def test_bad_options_are_one_message_and_leave_no_folder(
    words: list[str], message: str, tmp_path: Path, shown: Shown
) -> None:
    try:
        code = train_command(["--tuner", "--runs", str(tmp_path / "runs"), *words])
    except SystemExit as refused:  # tyro's own way
        code = int(refused.code or 0)
    assert code == 2
    assert message in shown().replace("│ ", "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair", "tiny", "--measurements", "-1"], "measurements must be a whole number from 0 to 10000, got -1"),
        (["--transfer", "--jobs", "0"], "--jobs must be a whole number from 1 to 256, got 0"),
        (["--transfer", "--seeds", str(2**32)], "each of --seeds must be a whole number from 0 to 4294967295"),
        (["--transfer", "--seeds"], "--seeds must have at least 1 value"),
        (["--report", "--pair", "tiny"], "give one at a time"),
    ],
)
def test_bad_options_of_an_evaluation_are_one_message(
    finished: Path, words: list[str], message: str, shown: Shown
) -> None:
    assert evaluate_command([str(finished), *words]) == 2
    assert message in shown()


def test_the_table_says_what_hardware_time_is_charged_for(finished: Path) -> None:
    hardware = json.loads((finished / "table.json").read_text())["hardware"]
    assert hardware["cores"] >= 1
    assert any("1 thread" in name for name in hardware["time is charged by profiles of"])


def test_a_tuner_s_options_are_refused_for_other_runs(finished: Path, tmp_path: Path, shown: Shown) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "settings.json").write_text(json.dumps({"format": "specgym-settings-1", "settings": {}}))
    assert evaluate_command([str(other), "--pair", "tiny"]) == 2
    assert "for runs of train.py --tuner" in shown()
    assert evaluate_command([str(finished), "--live"]) == 2
    assert "--live needs --pair" in shown()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(finished / "settings.json", tmp_path / "unfinished")
    assert evaluate_command([str(tmp_path / "unfinished")]) == 2
    assert "no finished policy" in shown()


def test_sessions_end_by_themselves_and_rewards_are_shares_of_each_workload_s_best() -> None:
    names = ("tiny-3m-ngram/prose", "tiny-3m-1l/prose")
    plain, shared = (TuningVectorEnv(4, workload=names, max_episode_steps=1) for _ in range(2))
    wrapped = TuningSessions(shared, {names[0]: 2.0, names[1]: 4.0})
    plain.reset(seed=1)
    wrapped.reset(seed=1)
    actions = np.zeros((4, 2), np.float32)
    expected = plain.step(actions)[1] / np.array([2.0, 4.0])[plain.workload_of]
    _, rewards, terminated, truncated, _ = wrapped.step(actions)
    np.testing.assert_allclose(rewards, expected)
    assert terminated.all()
    assert not truncated.any()
    with pytest.raises(ValueError, match="best reward of tiny-3m-1l/prose must be above 0"):
        TuningSessions(shared, {names[0]: 2.0})


def test_the_tuner_sees_a_task_as_it_saw_its_practice(finished: Path) -> None:
    """The first observation, and the place that an action puts the knobs at, are those of the environments."""
    settings = load_settings(finished / "settings.json")
    policy = ExportedPolicy.load(finished)
    environments = practice(settings, dict.fromkeys(WORKLOADS, 1.0))
    environments.seed(0)
    observations = np.asarray(environments.reset())
    task = TuningTask(WORKLOADS[0], RewardSettings(), max_new_tokens=16)
    place = int(np.flatnonzero(environments.get_attr("workload_of")[0] == 0)[0])
    proposed = LearnedSearcher(LearnedTuner(policy), task).propose([])
    observed = environments.step(np.stack([policy(row) for row in observations]))[0]
    assert list(proposed.values()) == pytest.approx(np.asarray(observed)[place, :2].tolist(), abs=1e-5)


def test_a_policy_that_sees_no_measurements_is_refused(finished: Path) -> None:
    policy = ExportedPolicy.load(finished)
    weights = dict(policy.weights)
    weights["low"], weights["high"] = weights["low"][:2], weights["high"][:2]
    weights["hidden.0.weight"] = weights["hidden.0.weight"][:, :2]
    blind = ExportedPolicy(policy.knobs, policy.state[:2], policy.std_low, policy.std_high, weights)
    with pytest.raises(RunFileError, match="sees no measurements"):
        LearnedTuner(blind)


@pytest.mark.parametrize(
    ("env", "workloads", "knobs", "left_out"),
    [
        ("specgym/Speculative-v0", ("tiny-3m-1l/prose", "tiny-3m-ngram/prose"), ["draft_length", "stop_threshold"], []),
        ("specgym/Medusa-v0", ("tiny-3m/prose", "tiny-10m/prose"), ["heads", "tree_size"], ["--leave-out", "pair"]),
    ],
)
def test_a_tuner_learns_the_knobs_of_any_decoder_that_replays(
    env: str,
    workloads: tuple[str, ...],
    knobs: list[str],
    left_out: list[str],
    tmp_path: Path,
    shown: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_validation, "run_tasks", run_here)
    words = options(tmp_path)
    words[2 : 2 + len(WORKLOADS)] = workloads
    assert train_command([*words, "--env", env, "--total-timesteps", "96"]) == 0
    run = tmp_path / "mine"
    (drawn, *_) = json.loads((run / "heat_maps.json").read_text())["maps"]
    assert list(drawn["axes"]) == knobs
    assert len(drawn["path"]) == 4  # the default, two measurements and the recommendation
    stored = json.loads((run / "knobs.json").read_text())
    assert list(stored["universal"]) == knobs
    recommended = shown().partition("Recommended settings")[2]
    pairs = [name.partition("/")[0] for name in workloads]
    assert list(stored["by_pair"]) == pairs
    for pair in pairs:
        loss = stored["by_pair"][pair]["universal_loss"]
        assert loss == pytest.approx(stored["loss"][f"{pair}/prose"])
        assert f"{loss:.1%}" in recommended.partition(f"{pair} ")[2]
    rows = json.loads((run / "patterns.json").read_text())["rows"]
    assert {row["aim"] for row in rows} == {"reward", "speed"}
    assert set(knobs) <= set(rows[0])
    assert train_command(["--resume", str(run)]) == 0
    assert evaluate_command([str(run)]) == 0
    assert "All numbers equal those in" in (said := shown())
    assert "one for all pairs" in said
    assert evaluate_command([str(run), "--pair", workloads[0].partition("/")[0], "--measurements", "1"]) == 0
    assert (f"{knobs[-1]}=" in (said := shown())) != ("Do not speculate on" in said)
    command = [str(run), "--transfer", *left_out, "--seeds", "0", "--jobs", "1"]
    assert evaluate_command(command) == 0
    said = shown()
    assert "Of 2 pairs no test can be significant" in said
    assert ("No dataset is left out: all workloads have the same, prose. No family is left out" in said) != bool(
        left_out
    )
    assert {fold["kind"] for fold in json.loads((run / "transfer.json").read_text())["folds"]} == {"pair"}
    assert evaluate_command([str(run), "--report"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") > 3
    assert f"Reward at ({', '.join(knobs)})" in page


def test_a_decoder_without_shipped_recordings_says_how_to_make_them(tmp_path: Path, shown: Shown) -> None:
    words = ["--tuner", "--env", "specgym/MedusaTypical-v0", "--runs", str(tmp_path / "runs")]
    assert train_command(words) == 2
    said = shown()
    assert "no recordings of medusa-typical ship with specgym; record some with `python -m specgym.envs.record" in said
    assert "--recordings recordings" in said
    assert not (tmp_path / "runs").exists()


def test_settings_of_earlier_versions_are_read(tmp_path: Path) -> None:
    earlier = {
        "workloads": ["tiny/prose"], "traces": "mine", "tokens_per_prompt": 24, "draft_length": 8, "measurements": 3
    }  # fmt: skip
    content = {"format": "specgym-tuner-settings-1", "command": "", "settings": earlier}
    (tmp_path / "settings.json").write_text(json.dumps(content))
    settings = load_settings(tmp_path / "settings.json")
    assert (settings.decoder, settings.max_new_tokens, settings.recordings) == ("threshold", 24, Path("mine"))
    assert dict(settings.options) == {"max_draft_length": 8, "stop": "never"}


def test_a_lossless_decoder_has_no_divergence_to_bound(tmp_path: Path, shown: Shown) -> None:
    words = ["--tuner", "--env", "specgym/Speculative-v0", "--runs", str(tmp_path), "--max-divergence", "0.1"]
    with contextlib.suppress(SystemExit):  # tyro's own way
        assert train_command(words) == 2
    assert "no divergence to weigh or to bound" in shown()


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_a_cross_validation_on_ray_is_that_without_it_though_a_worker_is_killed(finished: Path, tmp_path: Path) -> None:
    here, there = (shutil.copytree(finished, tmp_path / name) for name in ("here", "there"))
    options = ["--transfer", "--leave-out", "pair", "--seeds", "0", "1"]
    assert evaluate_command([str(here), *options]) == 0
    with killed_worker(lambda: bool(list(there.glob("folds/*/*/settings.json")))) as killed:
        assert evaluate_command([str(there), *options, "--ray"]) == 0
    assert killed
    results = [json.loads((run / "transfer.json").read_text())["results"] for run in (here, there)]
    assert results[0] == results[1]
