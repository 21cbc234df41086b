"""`train.py --env specgym/DraftLength-v0` and `evaluate.py` from the command line to the files, on a random pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specgym.agents import ExportedStopRule, StopSettings, default_settings, load_settings, save_settings
from specgym.agents.command_line import evaluate_command, train_command
from specgym.callbacks import RateCallback
from specgym.decoding import AutoregressiveDecoder, PipelinedDecoder
from specgym.envs import workload
from tests.helpers.small_runs import record_traces

DRAFT_LENGTH = ["--env", "specgym/DraftLength-v0"]
Train = Callable[..., int]


@pytest.fixture(scope="module")
def traces(small_workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_traces(small_workloads, tmp_path_factory.mktemp("traces"))


@pytest.fixture
def options(small_workloads: tuple[str, str], traces: Path, tmp_path: Path) -> list[str]:
    """Options of a run of seconds; time is charged as computed for a GPU, which measures nothing."""
    chosen = {
        "--recordings": traces, "--runs": tmp_path / "runs", "--name": "mine", "--hardware": "h100-sxm",
        "--max-draft-length": 4, "--max-new-tokens": 12, "--environments": 16, "--total-timesteps": 1024,
        "--learning.rollout-steps": 16, "--learning.batch-size": 64, "--comparison.passes": 2,
        "--comparison.resamples": 20,
    }  # fmt: skip
    words = [*DRAFT_LENGTH, "--workloads", *small_workloads, "--seeds", "0", "1"]
    return [*words, *(str(word) for pair in chosen.items() for word in pair)]


def test_a_run_from_its_start_over_a_resume_to_its_evaluation(
    options: list[str], small_workloads: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "runs" / "mine"
    assert train_command(options) == 0, capsys.readouterr().err
    settings = load_settings(run / "settings.json")
    assert settings.workloads == small_workloads
    assert settings.hardware == "h100-sxm"
    for seed in (0, 1):
        for name in ("policy.zip", "policy.safetensors", "policy.json"):
            assert (run / f"seed-{seed}" / name).stat().st_size > 0
    table = json.loads((run / "table.json").read_text())
    assert len(table["rows"]) == 3 * 9
    assert {row["method"] for row in table["rows"]} >= {"plain", "fixed", "bandit", "learned", "oracle"}
    assert "times the throughput of the best fixed length" in table["verdict"]
    events = EventAccumulator(str(run / "tensorboard" / "seed-1")).Reload()
    for tag in ("throughput", "rate", "draft_length", "draft_acceptance_rate"):
        assert len(events.Scalars(f"{tag}/{small_workloads[1]}")) == 4

    shutil.rmtree(run / "seed-1")
    kept = (run / "seed-0" / "policy.zip").stat().st_mtime_ns
    capsys.readouterr()
    assert train_command(["--resume", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Seed 0 (1 of 2): All 1024 steps are done. Seed 1 (2 of 2): Going on from the beginning" in shown
    assert (run / "seed-0" / "policy.zip").stat().st_mtime_ns == kept
    assert json.loads((run / "table.json").read_text())["rows"] == table["rows"]

    assert train_command(["--resume", str(run), "--seeds", "0", "1", "2"]) == 0
    widened = json.loads((run / "table.json").read_text())
    assert len(next(row for row in widened["rows"] if row["method"] == "learned")["by_seed"]) == 3

    capsys.readouterr()
    assert evaluate_command([str(run)]) == 0
    assert "All throughputs equal those in" in " ".join(capsys.readouterr().out.split())
    assert json.loads((run / "evaluation.json").read_text())["rows"] == widened["rows"]

    assert evaluate_command([str(run), "--live", small_workloads[0]]) == 0
    live = {row["method"]: row for row in json.loads((run / "live.json").read_text())["rows"]}
    assert set(live) == {"plain", "fixed", "confidence", "entropy", "product", "gain", "bandit", "learned"}
    assert live["fixed"]["charged"] == pytest.approx(live["fixed"]["replayed"])
    # Recorded numbers are rounded, so a rule at its very threshold may decide otherwise.
    for method, row in live.items():
        assert method == "bandit" or row["charged"] == pytest.approx(row["replayed"], rel=0.1)
        assert row["clock"] > 0


def test_a_rule_learned_beside_a_target_that_verifies_meanwhile_is_judged_and_decodes_live(
    options: list[str], small_workloads: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*options, "--seeds", "0", "--total-timesteps", "512"]
    assert train_command(words) == 0, capsys.readouterr().err
    turns, run = tmp_path / "runs" / "mine", tmp_path / "runs" / "beside"
    words = [*words, "--name", "beside", "--overlap", "pipelined", "--pre-verify", "0", "--in-turns", str(turns)]
    assert train_command(words) == 0, capsys.readouterr().err
    table = json.loads((run / "table.json").read_text())
    learned = next(row for row in table["rows"] if row["method"] == "learned")
    assert learned["rule"] == "learned, waiting"
    assert {row["method"] for row in table["rows"]} >= {"turns fixed", "turns rule", "turns learned", "fixed", "rule"}
    assert "times the throughput of the best fixed window" in table["verdict"]
    profiles = [json.loads(path.read_text())["rounds"] for path in sorted((run / "latency").glob("*.json"))]
    assert profiles == ["pipelined", "pipelined"]

    pair, rule = workload(small_workloads[0]).load(), ExportedStopRule.load(run / "seed-0")
    text = PipelinedDecoder(pair, 4, place="thread", stop=rule).generate([5, 3], max_new_tokens=12)
    assert text.tokens == AutoregressiveDecoder(pair).generate([5, 3], max_new_tokens=12).tokens

    capsys.readouterr()
    assert evaluate_command([str(run), "--live", small_workloads[0]]) == 2
    assert "asks its rule itself, and is judged by replay alone" in " ".join(capsys.readouterr().err.split())
    for changed, message in (
        (["--max-draft-length", "3"], "was learned with other max_draft_length"),
        (["--in-turns", str(run)], "is no run of --env specgym/DraftLength-v0 without --overlap"),
    ):
        assert train_command([*words, "--name", "other", *changed]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_resume_that_contradicts_the_run_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    save_settings(StopSettings(name="mine", runs=tmp_path / "runs"), run / "settings.json", "")
    resume = ["--resume", str(run)]
    for changed, message in (
        (["--total-timesteps", "7"], "planned for 2500000 steps; total_timesteps can only be raised, and 7 would"),
        (["--learning.gamma", "0.5"], "started with learning.gamma = 1.0"),
        (["--seeds", "5"], "seeds can only be added"),
    ):
        assert train_command([*resume, *changed]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert train_command([*resume, "--env", "specgym/Thresholds-v0"]) == 2
    messages = capsys.readouterr().err
    assert "is a run of --env specgym/DraftLength-v0, not of --env specgym/Thresholds-v0" in messages
    assert train_command(options) == 2
    assert "exists already; go on with --resume" in capsys.readouterr().err


def test_a_damaged_policy_is_refused_by_name(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "mine"
    assert train_command(options) == 0
    damaged = run / "seed-1" / "policy.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    capsys.readouterr()
    assert evaluate_command([str(run)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{damaged.with_name('policy.json')} and the files that it describes do not fit" in message
    assert "policy.safetensors" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--workloads", "tiny/prosa"], "Did you mean 'prose'"),
        (["--workloads", "tiny-10m-xs/prose", "--recordings", "nowhere"], "there is no trace"),
        (["--max-new-tokens", "13"], "has texts of 12 tokens, and max_new_tokens is 13"),
        (["--hardware", "h100"], "'h100' is no known hardware. Did you mean 'h100-sxm'"),
        (["--environments", "1"], "environments must be at least 2, one for each workload"),
        (["--seeds", "1", "1"], "seeds has 1 twice"),
        (["--max-draft-length", "33"], "max_draft_length must be a whole number from 2 to 32"),
        (["--learning.policy-layers", "0"], "each of policy_layers must be a whole number from 1 to 65536"),
        (["--name", "a/b"], "name must be a plain folder name"),
        (["--shapes", "llama-3.1-8b", "gpt"], "each of shapes must be one of 'llama"),
        (["--overlap", "threshold"], "whose draft goes on while the target verifies, and that of threshold does not"),
        (["--pre-verify", "0"], "in_turns and pre_verify are for runs with --overlap"),
        (["--overlap", "pipelined", "--pre-verify", "2"], "pre_verify must be a whole number from 0 to 1, got 2"),
        (["--shipped-latency"], "shipped_latency is neither for computed times nor for new ones"),
    ],
)
def test_bad_options_leave_one_message_and_no_folder(
    options: list[str], changed: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = train_command([*options, *changed])
    except SystemExit as refused:  # by the parser of options
        code = int(refused.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert message in " ".join((said.out + said.err).replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_live_is_refused_for_a_run_of_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_settings(default_settings("threshold", name="other"), tmp_path / "settings.json", "")
    assert evaluate_command([str(tmp_path), "--live", "tiny/prose"]) == 2
    assert "--live is for runs of --env specgym/DraftLength-v0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "mine", "others"),
    [
        ([], "--environment.reward.speed-weight", "--batch-sizes"),
        (DRAFT_LENGTH, "--batch-sizes", "--environment.reward.speed-weight"),
        (["--env=specgym/DraftLength-v0"], "--learning.rate-smoothing", "--subprocesses"),
    ],
)
def test_help_lists_both_environments_and_the_options_of_the_chosen_one(
    env: list[str], mine: str, others: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as shown:
        train_command([*env, "--help"])
    assert not shown.value.code
    text = capsys.readouterr().out
    for expected in ("specgym/Thresholds-v0", "specgym/DraftLength-v0", "--resume", mine):
        assert expected in text
    assert others not in text


def test_an_unknown_environment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        train_command(["--env", "specgym/Lookahead-v7"])
    assert refused.value.code == 2
    assert "specgym/DraftLength-v0" in capsys.readouterr().err


def test_interrupted_inside_a_seed_it_goes_on_from_its_checkpoint_and_may_replay_and_schedule(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "mine"
    words = [*options, "--checkpoint-every", "256", "--learning.replay.updates", "1", "--learning.replay.warm-up", "1",
             "--learning.entropy-end", "0.0"]  # fmt: skip
    rollouts = []

    def interrupted(callback: RateCallback) -> None:
        rollouts.append(1)
        if len(rollouts) == 7:  # of seed 1, since a seed has four
            raise KeyboardInterrupt
        real(callback)

    real = RateCallback._on_rollout_end
    with monkeypatch.context() as patch:
        patch.setattr(RateCallback, "_on_rollout_end", interrupted)
        assert train_command(words) == 130
    assert f"--resume {run}" in capsys.readouterr().err
    assert (run / "seed-0" / "policy.zip").is_file()
    assert not (run / "seed-1" / "policy.zip").exists()
    assert train_command(["--resume", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Seed 0 (1 of 2): All 1024 steps are done. Seed 1 (2 of 2): Going on from step 512." in shown
    assert json.loads((run / "seed-1" / "checkpoints" / "step_000001024" / "rate.json").read_text())
    assert evaluate_command([str(run), "--report"]) == 0
    assert "Stopping of drafts learned in mine" in (run / "report.html").read_text()
