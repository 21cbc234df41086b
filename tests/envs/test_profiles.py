"""Which latency profile time is charged by, and the command that measures one into a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specgym.decoding import Sampling
from specgym.decoding.latency import LatencyProfile, LatencyProfileError
from specgym.envs import Workload, profiles, workload
from specgym.envs.profiles import main, profile_name, profile_of
from specgym.envs.shipped_traces import TRACES


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> LatencyProfile:
        raise AssertionError("this would load the models")

    monkeypatch.setattr(profiles, "measured", refuse)


@pytest.mark.usefixtures("no_measuring")
def test_a_replay_of_a_shipped_workload_needs_no_model() -> None:
    names = {path.name.rsplit(".", 2)[0] for path in TRACES.glob("*.npz")}
    assert "tiny_prose" in names
    for name in names:
        pair, _, prompts = name.rpartition("_")
        found = workload(f"{pair}/{prompts}")
        profile = profile_of(found, None, replayed=True)
        assert profile.pair == pair
        assert profile.sampling == ("greedy" if found.sampling.greedy else "sampled")
        assert profile.at(batch_size=4).round(4) > 0


@pytest.mark.usefixtures("no_measuring")
def test_what_is_given_comes_first(profile: LatencyProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "own.json")
    found = workload("tiny/prose")
    for replayed in (True, False):
        assert profile_of(found, profile, replayed=replayed) is profile
        assert profile_of(found, tmp_path / "own.json", replayed=replayed) == profile
    with pytest.raises(LatencyProfileError, match=r"there is no latency profile .*missing\.json"):
        profile_of(found, tmp_path / "missing.json", replayed=True)


def test_live_decoding_and_pairs_of_ones_own_are_measured(
    toy_workload: Workload, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "measured", lambda pair, sampling: profile)
    assert profile_of(toy_workload, None, replayed=True) is profile
    assert profile_of(workload("tiny-3m-ngram/prose"), None, replayed=False) is profile


def test_greedy_workloads_of_a_pair_share_a_profile() -> None:
    names = [profile_name(workload(name)) for name in ("tiny/prose", "tiny/code", "tiny/code@0.7", "tiny/code@1.0")]
    assert names == ["tiny.greedy.json", "tiny.greedy.json", "tiny.sampled.json", "tiny.sampled.json"]


def test_the_command_measures_once(
    toy_workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = replace(toy_workload, sampling=Sampling(1.0), name="sampled")
    monkeypatch.setattr(profiles, "workload", {"toy/ids": toy_workload, "toy/ids@1.0": sampled}.get)
    arguments = ["toy/ids", "toy/ids@1.0", "--out", str(tmp_path), "--batch-sizes", "1", "2", "--max-draft-length", "2"]
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.greedy.json", "toy.sampled.json"]
    measured = LatencyProfile.load(tmp_path / "toy.greedy.json")
    assert measured.at(batch_size=2).autoregressive_seconds > 0
    assert "ms/token plain" in capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out.count("is there already") == 2
