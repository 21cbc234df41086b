"""`train.py --env <id>` for every registered decoder, from the command line to the files, on small recordings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from specgym.agents import ExportedPolicy, ResultTable, default_settings, load_settings
from specgym.agents.command_line import evaluate_command, train_command
from specgym.decoding import decoder_names, load_pair, traits_of
from specgym.decoding.decoders.medusa.files import save_heads
from specgym.envs import environment_id
from tests.helpers.small_medusa_heads import random_heads
from tests.helpers.small_runs import options, record_little, record_traces, target_alone

BOUND = 0.02
NO_FIGURE = '<svg viewBox="0 0 1 1"></svg>'
WEIGHED, WEIGHTS = "lookahead", ("--weights", "3", "1")
Shown = Callable[[], str]


def of_each_kind() -> list[str]:
    """A decoder of every kind of recording and of loss: what the code that is shared tells decoders apart by."""
    kinds = {(traits_of(name).recorded_by, traits_of(name).lossless): name for name in reversed(decoder_names())}
    return [name for name in decoder_names() if name in kinds.values()]


class Run(NamedTuple):
    """A finished run of a decoder."""

    decoder: str
    workloads: tuple[str, ...]
    recordings: Path
    folder: Path

    @property
    def policies(self) -> list[Path]:
        """Folders of the policies, one a seed."""
        return sorted(self.folder.glob("seed-*")) or [self.folder]


@pytest.fixture(scope="module")
def workloads(small_workloads: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    """The small workloads by decoder: with a draft or without, with Medusa heads beside the target."""
    alone = target_alone(small_workloads)
    folder = Path(alone[0].rpartition("/target/")[0]) / "target"
    target = load_pair(str(folder)).target
    save_heads(random_heads(target.model, 3, spread=0.05), folder.with_name("target-medusa"), target)
    chosen = {name: small_workloads if traits_of(name).needs_draft else alone for name in decoder_names()}
    return chosen | {"medusa-typical": alone[1:]}  # greedy texts do not depend on its thresholds


@pytest.fixture(scope="module")
def traces(small_workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of the small workloads, which all decoders that traces record share."""
    return record_traces(small_workloads, tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module", params=decoder_names())
def finished(
    request: pytest.FixtureRequest,
    workloads: dict[str, tuple[str, ...]],
    traces: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    """A run of a few hundred steps, for every decoder; of Lookahead with workloads that weigh differently."""
    decoder, runs = request.param, tmp_path_factory.mktemp("runs")
    traits, chosen, recordings = traits_of(decoder), workloads[decoder], traces
    more: dict[str, object] = {"--environment.backend": "replay"}
    if traits.recorded_by == "trace":
        more["--environment.max-draft-length"] = 4
    else:
        recordings = record_little(decoder, chosen, tmp_path_factory.mktemp("recordings"), settings=4)
    if not traits.lossless:
        more["--max-divergence"] = BOUND
    words = options(environment_id(decoder), runs, chosen, recordings, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert train_command([*words, *(WEIGHTS if decoder == WEIGHED else ())]) == 0
        yield Run(decoder, chosen, recordings, runs / "mine")


def test_a_run_leaves_knobs_a_policy_and_a_table(finished: Run) -> None:
    traits = traits_of(finished.decoder)
    knobs = [knob.name for knob in traits.knobs_without_pair()]
    settings = load_settings(finished.folder / "settings.json")
    assert (settings.decoder, settings.workloads) == (finished.decoder, finished.workloads)
    assert settings.weights == ((3, 1) if finished.decoder == WEIGHED else ())
    assert len(settings.seeds) == (1 if traits.lossless else 3)
    policy = ExportedPolicy.load(finished.policies[0])
    # A workload alone needs no mark.
    marks = [f"workload/{name}" for name in finished.workloads] if len(finished.workloads) > 1 else []
    assert policy.state == (*knobs, *marks)
    stored = json.loads((finished.folder / "knobs.json").read_text())
    assert list(stored["workloads"]) == list(finished.workloads)
    assert {name for name, values in stored["workloads"].items() if values is None} <= stored["reasons"].keys()
    for places in stored["rests"].values():
        assert len(places) == len(settings.seeds)
    rests = [rest for places in stored["rests"].values() for rest in places]
    for values in filter(None, (*stored["workloads"].values(), *stored["pairs"].values(), *rests)):
        assert list(values) == knobs
        for knob in policy.knobs:
            assert knob.low <= values[knob.name] <= knob.high
            assert type(values[knob.name]) is (int if knob.integer else float)
    table = ResultTable.load(finished.folder / "table.json")
    several = len(finished.workloads) > 1
    exact = [] if traits.lossless_at is None else ["exact, fixed", "exact, stop rule"]
    methods = ["plain", *exact, "default", *(["one for all"] if several else []), "learned"]
    assert [row.method for row in table.rows] == methods * (len(finished.workloads) + several)
    plain, learned = table.rows[0], table.rows[len(methods) - 1]
    assert ("perplexity" in plain.values) == (not traits.lossless)
    assert plain.values["target_tokens_per_token"] == 1
    assert learned.knobs == pytest.approx(stored["workloads"][finished.workloads[0]] or {})
    if traits.lossless:
        assert {row.values["divergence"] for row in table.rows} == {0}


def test_what_was_done_is_logged_by_knob_and_workload(finished: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = [finished.folder / "tensorboard" / policy.relative_to(finished.folder) for policy in finished.policies]
    tags = set.intersection(*(set(EventAccumulator(str(log)).Reload().Tags()["scalars"]) for log in logs))
    last = finished.workloads[-1]
    for knob in traits_of(finished.decoder).knobs_without_pair():
        assert {f"knobs/{knob.name}", f"policy/{knob.name}_std", f"workload/{last}/knobs/{knob.name}"} <= tags
    assert {"eval/mean_reward", "numerics/observations"} <= tags
    assert (f"bound/multiplier/{last}" in tags) == (not traits_of(finished.decoder).lossless)


def test_evaluated_again_the_charged_numbers_are_the_same(finished: Run, shown: Shown) -> None:
    assert evaluate_command([str(finished.folder)]) == 0
    text = shown()
    assert "All charged numbers equal" in text
    assert "Mean speedup" in text
    assert "referred" in text
    if not traits_of(finished.decoder).lossless:
        assert f"The bound of {BOUND} on the divergence is kept" in text
    else:
        assert "The text is the target's own" in text


def test_the_report_is_about_the_decoder_s_knobs(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if finished.decoder != decoder_names()[0]:  # figures are composed for all, and written out for one
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(NO_FIGURE))
    assert evaluate_command([str(finished.folder), "--report"]) == 0
    page = (finished.folder / "report.html").read_text()
    assert f"{finished.decoder} knobs learned in mine".lower() in page.lower()
    for knob in traits_of(finished.decoder).knobs_without_pair():
        assert knob.name.replace("_", " ").capitalize() in page
    assert (finished.folder / "report" / "recommended.csv").is_file()


@pytest.mark.parametrize("finished", of_each_kind(), indirect=True)
def test_a_finished_run_can_be_prolonged_and_nothing_else(finished: Run, shown: Shown, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished.folder, run)
    assert train_command(["--resume", str(run)]) == 0
    assert "All 320 steps are done" in shown()
    assert train_command(["--resume", str(run), "--total-timesteps", "400"]) == 0
    assert "Going on from step 320." in shown()
    commands = [json.loads((run / name).read_text())["command"] for name in ("table.json", "settings.json")]
    assert commands[0] == commands[1]
    assert train_command(["--resume", str(run), "--environment.max-new-tokens", "4"]) == 2
    assert "cannot go on with 4" in shown()
    assert train_command(["--env", "specgym/DraftLength-v0", "--resume", str(run)]) == 2
    ids = environment_id(finished.decoder)
    assert f"is a run of --env {ids}, not of --env specgym/DraftLength-v0; leave that out" in shown()


def test_what_does_not_apply_is_one_message_and_leaves_no_folder(finished: Run, tmp_path: Path, shown: Shown) -> None:
    traits = traits_of(finished.decoder)
    words = options(environment_id(finished.decoder), tmp_path / "runs", finished.workloads, finished.recordings)
    words += ["--environment.backend", "replay"]
    wrong = [(["--environment.recordings", "nowhere"], "nowhere has no")]
    if traits.lossless:
        wrong += [
            (["--max-divergence", "0.1"], "Unrecognized options: --max-divergence"),
            (["--environment.reward.max-divergence", "0.1"], "no divergence to weigh or to bound"),
        ]
    if traits.recorded_by == "outcomes":
        wrong += [
            (["--environment.max-draft-length", "4"], "Unrecognized options: --environment.max-draft-length"),
            (["--environment.max-new-tokens", "13"], "have texts of 12 tokens; ask for fewer, or record longer ones"),
        ]
    for more, message in wrong:
        try:
            code = train_command([*words, *more])
        except SystemExit as ended:  # what the parser itself refuses
            code = int(str(ended.code))
        assert code == 2
        assert message in shown()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("env", "workload", "message"),
    [
        ("specgym/DraftTree-v0", "tiny-3m/prose", "cannot be decoded so: "),
        ("specgym/Thresholds-v0", "tiny-3m/prose", "cannot be decoded so: "),
        ("specgym/Lookahead-v0", "tiny/prosa", "Did you mean 'prose'"),
    ],
)
def test_a_pair_that_does_not_suit_the_decoder_is_refused_before_there_is_a_folder(
    env: str, workload: str, message: str, tmp_path: Path, shown: Shown
) -> None:
    words = ["--env", env, "--runs", str(tmp_path / "runs"), "--workloads", workload]
    assert train_command([*words, "--environment.backend", "live"]) == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()


def test_a_target_without_heads_is_one_message_that_says_how_to_train_some_and_leaves_no_folder(
    workloads: dict[str, tuple[str, ...]], tmp_path: Path, shown: Shown
) -> None:
    folder, _, prompts = workloads["medusa"][0].rpartition("/target/")
    shutil.copytree(Path(folder, "target"), tmp_path / "bare")
    words = options(environment_id("medusa"), tmp_path / "runs", [f"{tmp_path / 'bare'}/{prompts}"], None)
    assert train_command([*words, "--environment.backend", "live"]) == 2
    assert f"no Medusa heads ship for {tmp_path / 'bare'}" in shown()
    assert not (tmp_path / "runs").exists()


def test_without_recordings_one_message_says_how_to_make_them_and_there_is_no_folder(
    small_workloads: tuple[str, str], tmp_path: Path, shown: Shown
) -> None:
    words = options(environment_id("draft-tree"), tmp_path / "runs", small_workloads[:1], tmp_path)
    assert train_command(words) == 2
    assert ".draft-tree.train.npz; make it: `python -m specgym.envs.record" in shown()
    assert train_command(["--env", environment_id("draft-tree"), "--workloads", "tiny-3m-ngram/prose",
                          "--runs", str(tmp_path / "runs")]) == 2  # fmt: skip
    assert "--environment.recordings" in shown()
    assert not (tmp_path / "runs").exists()


def test_greedy_texts_alone_are_refused_where_only_sampled_ones_change(tmp_path: Path, shown: Shown) -> None:
    assert default_settings("medusa-typical").workloads
    words = ["--env", environment_id("medusa-typical"), "--workloads", "tiny-3m/prose", "--runs", str(tmp_path / "r")]
    assert train_command([*words, "--environment.backend", "live"]) == 2
    assert "every workload is greedy" in shown()
    assert not (tmp_path / "r").exists()
