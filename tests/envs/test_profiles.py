"""Which latency profile time is charged by, and the command that measures one into a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specgym.decoding import MixedProfile, Pair, PromptLookupDrafter, Sampling, measured_mixed
from specgym.decoding.errors import SpecgymError
from specgym.decoding.latency.probe import Uncertainty, contradictions
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.envs import Workload, find_mixed_trace, profiles, workload
from specgym.envs.profiles import REFERENCES, main, mixed_profile_name, mixed_profile_of, profile_name, profile_of
from specgym.envs.recordings.find import TRACES, counted_chances, mixed_workloads
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> LatencyProfile:
        raise AssertionError("this would load the models")

    for name in ("measured", "measured_mixed"):
        monkeypatch.setattr(f"specgym.decoding.{name}", refuse)


@pytest.mark.usefixtures("no_measuring")
def test_a_replay_of_a_shipped_workload_needs_no_model() -> None:
    names = {path.name.rsplit(".", 2)[0] for path in TRACES.glob("*.npz")}
    assert {"tiny_prose", "tiny_code@0.7"} < names
    for name in names:
        if "@" in name and not name.startswith("tiny_"):
            continue  # has no reference profile of sampling
        pair, _, prompts = name.rpartition("_")
        result = workload(f"{pair}/{prompts}")
        profile = profile_of(result, None, replayed=True)
        assert profile.pair == pair
        assert profile.sampling == ("greedy" if result.sampling.greedy else "sampled")
        assert profile.at().round(4) > 0
        if profile.pair not in (*ONE_SEQUENCE, "translator"):
            assert profile.at(batch_size=4).round(4) > 0


@pytest.mark.usefixtures("no_measuring")
def test_what_is_given_comes_first(profile: LatencyProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "own.json")
    result = workload("tiny/prose")
    for replayed in (True, False):
        assert profile_of(result, profile, replayed=replayed) is profile
        assert profile_of(result, tmp_path / "own.json", replayed=replayed) == profile
        with pytest.raises(LatencyProfileError, match="made for chain rounds, and lookahead rounds are to be charged"):
            profile_of(result, tmp_path / "own.json", replayed=replayed, decoder="lookahead")
        with pytest.raises(LatencyProfileError, match="made for lookahead rounds, and chain rounds"):
            profile_of(result, replace(profile, kind="lookahead"), replayed=replayed)
    with pytest.raises(LatencyProfileError, match=r"there is no latency profile .*missing\.json"):
        profile_of(result, tmp_path / "missing.json", replayed=True)


def test_live_decoding_and_pairs_of_ones_own_are_measured(
    toy_workload: Workload, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str | None] = []

    def result(pair: Pair, decoder: str | None, *, sampling: Sampling) -> LatencyProfile:
        kinds.append(decoder)
        return profile

    monkeypatch.setattr("specgym.decoding.measured", result)
    assert profile_of(toy_workload, None, replayed=True) is profile
    assert profile_of(workload("tiny-3m-ngram/prose"), None, replayed=False) is profile
    assert profile_of(toy_workload, None, replayed=True, decoder="lookahead") is profile
    assert kinds == [None, None, "lookahead"]


def test_greedy_workloads_of_a_pair_share_a_profile() -> None:
    names = [profile_name(workload(name)) for name in ("tiny/prose", "tiny/code", "tiny/code@0.7", "tiny/code@1.0")]
    assert names == ["tiny.greedy.json", "tiny.greedy.json", "tiny.sampled.json", "tiny.sampled.json"]


@pytest.mark.usefixtures("no_measuring")
@pytest.mark.parametrize("name", ["tiny-10m/prose", "tiny/code", "tiny-3m-1l/chat", "tiny-10m/prose@1.0"])
def test_a_replay_of_lookahead_is_charged_by_the_reference_of_the_target_alone(name: str) -> None:
    result = profile_of(workload(name), None, replayed=True, decoder="lookahead")
    assert result.kind == "lookahead"
    assert result.pair == ("tiny-3m" if "3m" in name else "tiny-10m")
    assert result.sampling == ("sampled" if "@" in name else "greedy")
    assert result.draft_seconds == {0: 0.0}
    assert result.at().target(120) > result.at().target(20)


def test_lookaheads_profiles_are_named_after_the_target(toy_workload: Workload, pair: Pair) -> None:
    names = {
        profile_name(workload(name), "lookahead")
        for name in ("tiny/prose", "tiny-10m-ngram/code@0.0", "tiny-10m/chat", "tiny-10m-2l/definitions")
    }
    assert names == {"tiny-10m.lookahead.greedy.json"}
    assert profile_name(workload("tiny-3m/prose@0.7"), "lookahead") == "tiny-3m.lookahead.sampled.json"
    assert profile_name(toy_workload, "lookahead") == f"{pair.target.name}.lookahead.greedy.json"


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first measurement as it is, whatever else the machine does."""
    monkeypatch.setattr("specgym.decoding.latency.measure.measured_with_care", lambda measure, **_: measure())


@pytest.mark.usefixtures("measured_once")
def test_the_command_measures_lookahead_where_it_is_asked_to(
    toy_workload: Workload, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = replace(toy_workload, pair=Pair(pair.target, name="alone"), name="alone")
    monkeypatch.setattr(profiles, "workload", {"toy/ids": toy_workload, "alone/ids": alone}.get)
    with pytest.raises(SpecgymError, match=r"alone/ids cannot be measured: .* needs a draft.*--decoder lookahead"):
        main(["alone/ids", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    arguments = ["--decoder", "lookahead", "--out", str(tmp_path), "--max-target-tokens", "6", "--contexts", "9"]
    main(["alone/ids", *arguments])
    main(["toy/ids", *arguments])  # the same target: nothing left to do
    (path,) = tmp_path.iterdir()
    result = LatencyProfile.load(path)
    assert (path.name, result.kind) == (f"{pair.target.name}.lookahead.greedy.json", "lookahead")
    assert list(result.target_seconds) == [1, 2, 4, 6]
    assert result.at(context=9).context == 9
    with pytest.raises(SpecgymError, match=r"alone/ids cannot be measured: .*batch size 1 alone"):
        main(["alone/ids", "--decoder", "lookahead", "--out", str(tmp_path / "other"), "--batch-sizes", "1", "4"])


@pytest.mark.usefixtures("measured_once")
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
    with pytest.raises(LatencyProfileError, match=r"of weights in float32, and --dtype is float16; give another --out"):
        main([*arguments, "--dtype", "float16"])
    with pytest.raises(SpecgymError, match="device must be cpu"):
        main([*arguments, "--device", "tpu"])


def test_the_command_writes_no_profile_that_contradicts_itself(
    toy_workload: Workload, profile: LatencyProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubtful = replace(profile, uncertainty=Uncertainty({}, {}, 0.0, 0.5, ("a larger pass is cheaper",)))
    monkeypatch.setattr(profiles, "workload", {"toy/ids": toy_workload}.get)
    monkeypatch.setattr("specgym.decoding.measure", lambda *_, **__: doubtful)
    with pytest.raises(LatencyProfileError, match=r"not written.*a larger pass is cheaper.*the same command again"):
        main(["toy/ids", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


ONE_SEQUENCE = ("smollm2-2l", "smollm2-4l")
"""Pairs whose reference profiles have no batches. Their target's pass over 2 tokens takes longer than one over 5 in
every measurement on a quiet machine, so that the profiles are smoothed and say so."""


OF_SEVERAL = sorted(REFERENCES.glob("*.mixed.*.json"))
"""Profiles of pairs with several drafts."""


@pytest.mark.parametrize("path", sorted({*REFERENCES.glob("*.json")} - {*OF_SEVERAL}), ids=lambda path: path.stem)
def test_the_profiles_that_ship_do_not_contradict_themselves(path: Path) -> None:
    reference = LatencyProfile.load(path)
    if reference.pair in ONE_SEQUENCE and reference.uncertainty is not None:
        (doubt,) = reference.doubts
        assert doubt.startswith("a pass over 5 tokens takes")
        assert reference.uncertainty.spread < 0.05
        reference = replace(reference, uncertainty=replace(reference.uncertainty, doubts=()))
    assert contradictions(reference) == []
    assert reference.round(0) >= reference.autoregressive_seconds * (1 - 1e-9)


@pytest.fixture
def several(toy_workload: Workload, pair: Pair) -> Workload:
    """The toy pair with a second draft."""
    assert pair.draft is not None
    drafts = [PromptLookupDrafter(pair.target.vocabulary_size), pair.draft]
    return replace(toy_workload, pair=Pair(pair.target, drafts, name="toy"))


def test_a_choice_of_drafts_is_charged_by_what_is_given_or_else_measured(
    several: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = made_up_mixed()
    costs = made_up_costs(trace)
    costs.save(tmp_path / "own.json")
    assert mixed_profile_of(several, costs, replayed=True) is costs
    assert mixed_profile_of(several, tmp_path / "own.json", replayed=False, drafts=trace.drafts) == costs
    with pytest.raises(LatencyProfileError, match="of the drafts model-0"):
        mixed_profile_of(several, costs, replayed=True, drafts=trace.drafts[:1])
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    measured = mixed_profile_of(several, None, replayed=True)
    assert measured is measured_mixed(several.load())
    assert [draft.name for draft in measured.drafts] == [draft.name for draft in several.load().draft.drafts]  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_measuring")
def test_a_replay_of_shipped_drafts_needs_no_model() -> None:
    names = mixed_workloads()
    assert "tiny-10m-mixed/prose" in names
    for name in names:
        trace, named = find_mixed_trace(None, name)
        profile = mixed_profile_of(named, None, replayed=True, drafts=trace.drafts)
        assert profile.sampling == ("greedy" if named.sampling.greedy else "sampled")
        counted = profile.with_chances(counted_chances(named, profile)).chances
        assert (counted == [chances.exact for chances in trace.chances]).all()
    fewer = replace(profile, drafts=profile.drafts[:2])
    assert counted_chances(named, fewer) == [None, None]
    assert counted_chances(replace(named, pair="tiny-10m+tiny-10m-draft-2l,suffix"), fewer) == [None, None]


def test_the_command_measures_every_draft_of_several(
    several: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = made_up_costs(made_up_mixed(free=(True, False), right=(0.5, 0.5)))
    longest: list[int | None] = []

    def measured(pair: Pair, *, max_draft_length: int | None, sampling: Sampling) -> MixedProfile:
        longest.append(max_draft_length)
        return costs

    monkeypatch.setattr(profiles, "workload", {"toy/ids": several}.get)
    monkeypatch.setattr("specgym.decoding.measure_mixed", measured)
    arguments = ["toy/ids", "--out", str(tmp_path), "--max-draft-length", "2"]
    with pytest.raises(LatencyProfileError, match="leave out --batch-sizes"):
        main([*arguments, "--batch-sizes", "1", "4"])
    main(arguments)
    (path,) = tmp_path.iterdir()
    assert path.name == mixed_profile_name(several) == "toy.mixed.greedy.json"
    assert (MixedProfile.load(path), longest) == (costs, [2])
    assert "100 ms by model-1" in capsys.readouterr().out
    main(arguments)
    assert "is there already" in capsys.readouterr().out
    path.unlink()
    costs = replace(costs, doubts=("a larger pass is cheaper",))
    with pytest.raises(LatencyProfileError, match=r"not written.*a larger pass is cheaper"):
        main(arguments)


@pytest.mark.parametrize("path", OF_SEVERAL, ids=lambda path: path.stem)
def test_the_profiles_of_several_drafts_that_ship_do_not_contradict_themselves(path: Path) -> None:
    reference = MixedProfile.load(path)
    assert path.name == f"{reference.pair}.mixed.{reference.sampling}.json"
    assert reference.target(1) >= reference.autoregressive_seconds * (1 - 1e-9)
    for draft in reference.drafts:
        seconds = list(draft.reading_seconds.values())
        assert seconds == sorted(seconds)
        assert (draft.reading(1) < 0.02 * reference.target(1)) == draft.free
    if not reference.pair.startswith("smollm2"):
        assert not reference.doubts
