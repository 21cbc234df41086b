"""`train.py --env specgym/DraftChoice-v0` and `evaluate.py` from the command line to the files, on a random pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specgym.agents import load_settings
from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.experiments.control import choose_drafts
from specgym.agents.report.content import subject
from specgym.decoding import MixedProfile, Pair, drafts_of, is_free
from specgym.decoding.latency.mixed_profile import DraftCosts
from specgym.envs.recordings.mixed_recorder import RecordSettings, record_mixed
from specgym.envs.recordings.trace import trace_name


@pytest.fixture(scope="module")
def workloads(small_workloads: tuple[str, str]) -> tuple[str, str]:
    """The small workloads with a look-up and a suffix draft besides."""
    greedy, sampled = (name.replace("/draft/", "/draft,prompt-lookup,suffix/") for name in small_workloads)
    return greedy, sampled


@pytest.fixture(scope="module")
def recordings(workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for name in workloads:
        for split in ("train", "test"):
            few = RecordSettings(draft_length=4, prompts=3, tokens=12, detour_prompts=0)
            record_mixed(name, split, folder / trace_name(name, split), few)
    return folder


@pytest.fixture(autouse=True)
def _nobody_measures_several_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    def profile(pair: Pair, refresh: bool = False, **options: object) -> MixedProfile:
        drafts = [DraftCosts(draft.name, is_free(draft), {1: 0.001 if is_free(draft) else 0.2}) for draft in
                  drafts_of(pair.draft)]  # fmt: skip
        return MixedProfile(pair.name, tuple(drafts), {1: 1.0, 5: 1.2}, 1.0, {"device": "nobody's"})

    monkeypatch.setattr(choose_drafts, "measured_mixed", profile)


@pytest.fixture
def options(workloads: tuple[str, str], recordings: Path, tmp_path: Path) -> list[str]:
    """Options of a run of seconds."""
    chosen = {
        "--recordings": recordings, "--runs": tmp_path / "runs", "--name": "mine", "--max-draft-length": 4,
        "--max-new-tokens": 12, "--environments": 16, "--total-timesteps": 256, "--checkpoint-every": 128,
        "--learning.rollout-steps": 8, "--learning.batch-size": 64, "--comparison.passes": 2,
        "--comparison.resamples": 20, "--plan.rounds": 0,
    }  # fmt: skip
    words = ["--env", "specgym/DraftChoice-v0", "--workloads", *workloads, "--seeds", "0", "1"]
    return [*words, *(str(word) for pair in chosen.items() for word in pair)]


def test_a_run_from_its_start_over_a_resume_to_its_evaluation(
    options: list[str], workloads: tuple[str, str], tmp_path: Path, shown: Callable[[], str]
) -> None:
    run = tmp_path / "runs" / "mine"
    assert train_command(options) == 0, shown()
    settings = load_settings(run / "settings.json")
    assert settings.workloads == workloads
    assert subject(settings) == "choice of drafts"
    for seed in (0, 1):
        for name in ("policy.zip", "policy.safetensors", "policy.json"):
            assert (run / f"seed-{seed}" / name).stat().st_size > 0
    table = json.loads((run / "table.json").read_text())
    assert len(table["rows"]) == 3 * 7
    assert {row["method"] for row in table["rows"]} >= {"plain", "single", "hybrid", "learned", "clairvoyant"}
    assert "times the throughput of the best single draft" in table["verdict"]

    shutil.rmtree(run / "seed-1")
    for checkpoint in sorted((run / "seed-0" / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(checkpoint)
    (run / "seed-0" / "policy.zip").unlink()
    (run / "table.json").unlink()
    shown()
    assert train_command(["--resume", str(run)]) == 0
    assert "Going on from step 128. Seed 1 (2 of 2): Going on from the beginning" in shown()
    again = json.loads((run / "table.json").read_text())
    # Seed 1 is learned again, and learns the same.
    learned, before = (
        [row["by_seed"][1] for row in stored["rows"] if row["method"] == "learned"] for stored in (again, table)
    )
    assert learned == before

    shown()
    assert evaluate_command([str(run)]) == 0
    assert "All throughputs equal those in" in shown()

    assert evaluate_command([str(run), "--live", workloads[0]]) == 0
    live = {row["method"]: row for row in json.loads((run / "live.json").read_text())["rows"]}
    assert set(live) == {"plain", "single", "hybrid", "closed form", "learned"}
    assert live["single"]["charged"] == pytest.approx(live["single"]["replayed"])
    # Recorded numbers are rounded, and after a wrong token a replay does not show what a draft would go on with.
    assert live["learned"]["charged"] == pytest.approx(live["learned"]["replayed"], rel=0.1)
    assert live["learned"]["clock"] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--workloads", "tiny-3m-mixed/prosa"], "Did you mean"),
        (["--workloads", "tiny-3m-mixed/prose", "--recordings", "nowhere"], "nowhere"),
        (["--max-draft-length", "5"], "has drafts of 4 tokens, and max_draft_length is 5"),
        (["--environments", "1"], "environments must be at least 2, one for each workload"),
    ],
)
def test_bad_options_leave_one_message_and_no_folder(
    options: list[str], changed: list[str], message: str, tmp_path: Path, shown: Callable[[], str]
) -> None:
    assert train_command([*options, *changed]) == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()
