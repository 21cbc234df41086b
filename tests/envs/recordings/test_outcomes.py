"""Outcomes: which settings are recorded, what is written, read back, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.decoding import LookaheadDecoder, NumericalError, Pair, SpeculativeDecoder, ThresholdDecoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TokenPrompts, Workload
from specgym.envs import record as record_module
from specgym.envs.backends.outcome_replay import OutcomeReplay
from specgym.envs.recordings import outcome_recorder as module
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, design, fastest, record_outcomes
from specgym.envs.recordings.outcomes import COUNTS, FORMAT, OutcomeError, Outcomes, RecordedKnob
from tests.helpers.recorded_outcomes import lengths_alone

FEW = OutcomeSettings("lookahead", settings=4, prompts=2, tokens=12)


@pytest.fixture
def work(pair: Pair) -> Workload:
    return Workload(pair, TokenPrompts([[1, 2, 3], [4, 5], [6]], [[11, 12], [13]]))


@pytest.fixture
def path(work: Workload, tmp_path: Path) -> Path:
    record_outcomes(work, "train", tmp_path / "toy.npz", FEW)
    return tmp_path / "toy.npz"


# Which settings.


def test_the_default_and_the_presets_come_first_and_no_setting_twice() -> None:
    settings = OutcomeSettings("lookahead", settings=30).designed()
    assert settings[:2].tolist() == [[5, 3, 5], [15, 5, 15]]
    assert len(np.unique(settings, axis=0)) == 30
    assert (settings % 1 == 0).all()
    assert (settings.min(0) >= [1, 2, 0]).all()
    assert (settings.max(0) <= [16, 6, 16]).all()


def test_settings_leave_no_part_of_a_range_empty() -> None:
    fallback, rollback = OutcomeSettings("threshold", settings=33).designed()[1:].T
    for values, low, high in ((fallback, 0.05, 0.95), (rollback, 1, 16)):
        counts, _ = np.histogram(values, bins=8, range=(low, high))
        assert counts.min() >= 2


def test_the_end_of_a_whole_number_range_is_as_likely_as_its_middle() -> None:
    knobs = (RecordedKnob("one", 1, 4, True), RecordedKnob("two", 0, 1, False))
    counts = np.bincount(design(knobs, 400, [], seed=0)[:, 0].astype(int))[1:]
    assert counts.min() >= 90


def test_where_there_are_fewer_settings_than_asked_for_all_are_taken() -> None:
    settings = design((RecordedKnob("draft_length", 1, 6, True),), 48, [[5]], seed=0)
    assert settings[0, 0] == 5
    assert sorted(settings[:, 0]) == [1, 2, 3, 4, 5, 6]


def test_presets_beyond_the_longest_draft_are_moved_to_it() -> None:
    settings = OutcomeSettings("speculative", settings=8, draft_length=6).designed()
    assert settings[:3].tolist() == [[5, 0], [6, 0.4], [3, 0]]


def test_another_seed_gives_other_settings() -> None:
    assert not np.array_equal(OutcomeSettings(seed=1).designed(), OutcomeSettings(seed=2).designed())
    np.testing.assert_array_equal(OutcomeSettings(seed=1).designed(), OutcomeSettings(seed=1).designed())


# Recording.


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lookahead", LookaheadDecoder),
        ("speculative", lambda pair: SpeculativeDecoder(pair, 4)),
        ("threshold", lambda pair: ThresholdDecoder(pair, 4)),
    ],
)
def test_the_rounds_are_those_of_the_decoder(
    work: Workload, tmp_path: Path, name: str, make: Callable[[Pair], Any]
) -> None:
    settings = OutcomeSettings(name, settings=4, prompts=3, tokens=12, draft_length=4)
    result = record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    assert result.prompts == 3
    assert len(result.settings) == 4
    decoder, ours = make(work.load()), []
    for number, setting in enumerate(result.settings):
        knobs = dict(zip((knob.name for knob in decoder.knobs), setting.tolist(), strict=True))
        for place, prompt in enumerate(work.prompt_ids("train")):
            seed = int(np.random.SeedSequence((0, number, place)).generate_state(1)[0])
            ours += decoder.generate(prompt, max_new_tokens=12, seed=seed, knobs=knobs).rounds
    assert [len(round_.tokens) for round_ in ours] == result.emitted.tolist()
    for count in COUNTS[1:]:
        assert [getattr(round_, count) for round_ in ours] == getattr(result, count).tolist()
    assert result.divergence.tolist() == pytest.approx([round_.divergence for round_ in ours])
    assert result.divergence.any() == (name == "threshold")


def test_a_lossless_decoders_divergence_takes_no_room(path: Path) -> None:
    with np.load(path) as archive:
        assert "divergence" not in archive.files
        assert archive["emitted"].dtype == np.uint8


def test_a_resumed_recording_equals_an_unbroken_one(
    work: Workload, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "toy.npz"
    real, decoded = module._decoded, []

    def fails_at_the_sixth(*arguments: Any) -> Any:
        decoded.append(arguments)
        if len(decoded) == 6:
            raise NumericalError("power cut")
        return real(*arguments)

    monkeypatch.setattr(module, "_decoded", fails_at_the_sixth)
    with pytest.raises(NumericalError):
        record_outcomes(work, "train", broken, FEW)
    assert not broken.exists()
    record_outcomes(work, "train", broken, FEW)
    assert len(decoded) == 4 * 2 + 1  # the sixth text alone was tried twice
    assert [entry.name for entry in broken.parent.iterdir()] == ["toy.npz"]
    assert_same(Outcomes.load(broken), Outcomes.load(path))


def test_refining_adds_the_settings_that_would_be_fastest_and_goes_on_where_it_stopped(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one token costing as much as many, the more tokens a round emits the better."""
    profile = LatencyProfile("toy", {0: 0.0}, {1: 1.0, 200: 1.0}, 1.0, {}, kind="lookahead")
    settings = replace(FEW, settings=12, refine=8)
    whole = record_outcomes(work, "train", tmp_path / "whole.npz", settings, profile=profile)
    plain = record_outcomes(work, "train", tmp_path / "plain.npz", replace(FEW, settings=12))
    assert len(whole.settings) == 20
    assert len(np.unique(whole.settings, axis=0)) == 20
    np.testing.assert_array_equal(whole.settings[:12], plain.settings)
    np.testing.assert_array_equal(whole.settings[12:18], fastest(plain, profile, 6))

    def rounds(settings: np.ndarray) -> float:
        return float(OutcomeReplay([plain], [profile], 12).means(0, settings)["rounds"].mean())

    assert rounds(whole.settings[12:18]) < rounds(whole.settings[:12])

    decode, calls = module._decoded, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(module, "_decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(work, "train", tmp_path / "broken.npz", settings, profile=profile)
    monkeypatch.setattr(module, "_decoded", decode)
    other = replace(profile, target_seconds={1: 1.0, 200: 200.0})  # what was chosen stays chosen
    resumed = record_outcomes(work, "train", tmp_path / "broken.npz", settings, profile=other)
    np.testing.assert_array_equal(resumed.settings[:18], whole.settings[:18])
    assert (tmp_path / "broken.npz.parts").exists() is False


def test_nothing_is_refined_where_all_settings_are_recorded(work: Workload, tmp_path: Path) -> None:
    profile = LatencyProfile("toy", {0: 0.0, 1: 0.1}, {1: 1.0, 2: 1.1}, 1.0, {})
    settings = OutcomeSettings("speculative", settings=5, refine=3, prompts=2, tokens=8, draft_length=4)
    with lengths_alone():
        result = record_outcomes(work, "train", tmp_path / "all.npz", settings, profile=profile)
    assert sorted(result.settings[:, 0]) == [0, 1, 2, 3, 4]


def test_parts_of_another_recording_are_refused(work: Workload, tmp_path: Path) -> None:
    (tmp_path / "toy.npz.parts").mkdir()
    (tmp_path / "toy.npz.parts" / "recording.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds parts of another recording"):
        record_outcomes(work, "train", tmp_path / "toy.npz", FEW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts must be a whole number of at least 1"),
        (
            {"settings": 1},
            "settings must be a whole number from 2 to 100000, got 1; lookahead.s default and its presets",
        ),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"decoder": "beam"}, "no decoder 'beam' can be recorded; there are: threshold, speculative, lookahead"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OutcomeError, match=message):
        replace(FEW, **change)


def test_a_decoder_that_drafts_refuses_a_pair_without_a_draft(work: Workload, tmp_path: Path) -> None:
    alone = replace(work, pair=Pair(work.load().target, name="alone"), name="")
    with pytest.raises(ValueError, match="pair alone has none"):
        record_outcomes(alone, "train", tmp_path / "alone.npz", replace(FEW, decoder="speculative"))
    assert record_outcomes(alone, "train", tmp_path / "alone.npz", FEW).info.draft == ""


# The file.


def assert_same(ours: Outcomes, theirs: Outcomes) -> None:
    assert ours.info == theirs.info
    for name in ("settings", "starts", *COUNTS, "divergence"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def test_what_is_written_is_read_back(path: Path, tmp_path: Path) -> None:
    outcomes = Outcomes.load(path)
    some = replace(outcomes, divergence=np.linspace(0, 1, len(outcomes.emitted), dtype=np.float32))
    some.save(tmp_path / "again.npz")
    assert_same(Outcomes.load(tmp_path / "again.npz"), some)
    assert (outcomes.info.workload, outcomes.info.decoder, outcomes.info.split) == ("toy/ids", "lookahead", "train")


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused_by_name(path: Path, tmp_path: Path, kept: float) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(OutcomeError, match=r"cut\.npz is damaged, or none .* record it again"):
        Outcomes.load(cut)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    with pytest.raises(OutcomeError, match=rf"foreign\.npz is no file of outcomes of this version \({FORMAT}\)"):
        Outcomes.load(tmp_path / "foreign.npz")
    with pytest.raises(OutcomeError, match=r"there is no file of outcomes .*missing\.npz"):
        Outcomes.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("starts", lambda values: values[::-1], "starts"),
        ("starts", lambda values: values[:-1], "starts"),
        ("settings", lambda values: values + 16, "settings has values of window outside 1 to 16"),
        ("settings", lambda values: values + np.nan, "settings has values of window"),
        ("settings", lambda values: values[[0] * len(values)], "settings has one twice"),
        ("settings", lambda values: values[:, :2], r"expected \(n, 3\)"),
        ("emitted", lambda values: values * 0, "emitted has values below 1"),
        ("emitted", lambda values: values + 12, "emitted has texts of more than 12 tokens"),
        ("accepted", lambda values: values + 100, "accepted is more than was drafted"),
        ("target_tokens", lambda values: values[:-1], "target_tokens has shape"),
        ("divergence", lambda values: values - 1, "divergence has values below 0"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(
    path: Path, tmp_path: Path, name: str, spoil: Callable[[Any], Any], message: str
) -> None:
    outcomes = Outcomes.load(path)
    replace(outcomes, **{name: spoil(getattr(outcomes, name))}).save(tmp_path / "spoilt.npz")
    with pytest.raises(OutcomeError, match=rf"spoilt\.npz is damaged \(.*{message}"):
        Outcomes.load(tmp_path / "spoilt.npz")


# The command.


def test_the_command_records_outcomes_and_leaves_finished_ones_alone(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record_module, "workload", lambda name: work)
    arguments = ["tiny-10m/code", "--decoder", "lookahead", "--out", str(tmp_path), "--settings", "3", "--prompts", "1"]
    arguments += ["--tokens", "4"]
    record_module.main(arguments)
    names = [f"tiny-10m_code.lookahead.{split}.npz" for split in ("test", "train")]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert Outcomes.load(tmp_path / names[0]).info.tokens == 4
    assert "3 settings of 1 prompts" in capsys.readouterr().out
    record_module.main(arguments)
    assert capsys.readouterr().out.count("is there already") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--settings", "5"], "--settings is for outcomes; give --decoder"),
        (["--decoder", "lookahead", "--detour-prompts", "5"], "--detour-prompts is for traces"),
        (["--decoder", "lookahead", "--draft-length", "5"], "--draft-length: lookahead drafts no tokens"),
        (["--decoder", "beam"], "no decoder 'beam' can be recorded"),
    ],
)
def test_options_that_do_not_apply_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        record_module.main(["tiny-3m/code", *options])
