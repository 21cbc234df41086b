"""`train.py --env specgym/DraftTree-v0` from the command line to the files, on a small recording of a random pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.experiments.tune_knobs import DraftTreeSettings, load_settings
from specgym.agents.export.knob_policy import ExportedPolicy
from specgym.agents.training.run_folder import RunFolder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings import find
from tests.helpers.small_runs import options, record_little, target_alone

ENV = "specgym/DraftTree-v0"
KNOBS = ("max_candidates", "max_depth", "node_budget", "min_acceptance_prob")
Shown = Callable[[], str]


@pytest.fixture(scope="module")
def recordings(small_workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outcomes of the small pair, greedy."""
    return record_little("draft-tree", small_workloads[:1], tmp_path_factory.mktemp("outcomes"))


@pytest.fixture(scope="module")
def finished(
    small_workloads: tuple[str, str], recordings: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A run of a few hundred steps."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert train_command(options(ENV, runs, small_workloads[:1], recordings)) == 0
        yield runs / "mine"


def test_a_run_learns_the_tree_s_knobs_within_their_ranges_and_is_charged_by_trees_of_the_pair(
    finished: Path, small_workloads: tuple[str, str]
) -> None:
    settings = load_settings(finished / "settings.json")
    assert type(settings) is DraftTreeSettings
    policy = ExportedPolicy.load(finished)
    assert policy.state == KNOBS  # a workload alone needs no mark
    assert [(knob.low, knob.high, knob.integer, knob.logarithmic) for knob in policy.knobs] == [
        (1, 8, True, False),
        (0, 8, True, False),
        (0, 64, True, True),
        (0, 0.3, False, False),
    ]
    learned = json.loads((finished / "knobs.json").read_text())["workloads"][small_workloads[0]]
    assert tuple(learned) == KNOBS
    assert [type(learned[name]) for name in KNOBS] == [int, int, int, float]
    rows = json.loads((finished / "table.json").read_text())["rows"]
    plain, usual, chosen = rows[:3]
    assert [row["method"] for row in (plain, usual, chosen)] == ["autoregressive", "default", "learned"]
    assert {row["divergence"] for row in rows} == {0}
    assert usual["knobs"] == {"max_candidates": 5, "max_depth": 4, "node_budget": 16, "min_acceptance_prob": 0.1}
    assert plain["target_tokens_per_token"] == 1
    assert usual["reward"] == pytest.approx(usual["speedup"])
    assert chosen["knobs"] == pytest.approx(learned)
    (path,) = RunFolder(finished).profile_paths(settings)
    profile = LatencyProfile.load(path)
    assert (profile.rounds, max(profile.draft_seconds), max(profile.target_seconds)) == ("draft-tree", 8, 65)
    assert profile.pair == small_workloads[0].rpartition("/draft/")[0] + "/draft"


def test_evaluated_again_the_charged_numbers_are_the_same(finished: Path, shown: Shown) -> None:
    assert evaluate_command([str(finished)]) == 0
    told = shown()
    assert "All charged numbers equal" in told
    assert "Learned draft tree knobs against the defaults" in told
    assert "The text is the target's own." in told


def test_the_report_is_about_trees(finished: Path) -> None:
    assert evaluate_command([str(finished), "--report"]) == 0
    page = (finished / "report.html").read_text()
    for told in ("Draft tree knobs learned in mine", "Node budget in use", "Max depth in use", "tokens read per token"):
        assert told in page


def test_without_recordings_one_message_says_how_to_make_them_and_there_is_no_folder(
    small_workloads: tuple[str, str], tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "OUTCOMES", tmp_path)
    assert train_command(["--env", ENV, "--runs", str(tmp_path / "runs")]) == 2
    told = shown()
    assert "no draft-tree outcomes of tiny/prose" in told
    assert "python -m specgym.envs.record 'tiny/prose' --decoder draft-tree --out outcomes" in told
    assert "--environment.recordings" in told
    assert train_command(options(ENV, tmp_path / "runs", small_workloads[:1], tmp_path)) == 2
    assert ".draft-tree.train.npz; make it: `python -m specgym.envs.record" in shown()
    assert not (tmp_path / "runs").exists()


def test_a_pair_without_a_draft_is_refused_before_there_is_a_folder(
    small_workloads: tuple[str, str], tmp_path: Path, shown: Shown
) -> None:
    alone = target_alone(small_workloads)[:1]
    words = [*options(ENV, tmp_path / "runs", alone, None), "--environment.backend", "live"]
    assert train_command(words) == 2
    assert "cannot be decoded so: DraftTreeDecoder needs a draft" in shown()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--max-divergence", "0.1"], "Unrecognized options: --max-divergence"),
        (["--environment.draft-length", "4"], "Unrecognized options: --environment.draft-length"),
        (["--environment.reward.max-divergence", "0.1"], "no divergence to weigh or to bound"),
        (["--environment.tokens-per-step", "13"], "have texts of 12 tokens; ask for fewer, or record longer ones"),
    ],
)
def test_what_does_not_apply_is_one_message_and_leaves_no_folder(
    wrong: list[str], message: str, small_workloads: tuple[str, str], recordings: Path, tmp_path: Path, shown: Shown
) -> None:
    try:
        code = train_command([*options(ENV, tmp_path / "runs", small_workloads[:1], recordings), *wrong])
    except SystemExit as ended:  # what the parser itself refuses
        code = int(str(ended.code))
    assert code == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()
