"""Traces: what is recorded, written, read back, resumed, and refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from specgym.decoding import (
    AutoregressiveDecoder,
    LatencyProfile,
    NumericalError,
    Pair,
    Sampling,
    SpecgymError,
    ThresholdDecoder,
)
from specgym.envs import TokenPrompts, Workload
from specgym.envs import record as record_module
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings import trace_recorder
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.trace import FORMAT, Trace, trace_name

SETTINGS = RecordSettings(draft_length=4, prompts=3, tokens=20, detour_prompts=2, detour_tokens=10)
PROFILE = LatencyProfile("toy", {0: 0.0, 4: 0.004}, {1: 0.010, 5: 0.012}, 0.010, {}, context=4)
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def _also_all_of_a_draft() -> Iterator[None]:
    """Detours that take all of a draft back, too; those that ship take back the rejected token alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_recorder, "TAKEN_BACK", (1, 16))
        yield


@pytest.fixture(scope="module")
def work(make_model: MakeModel, make_noisy: MakeModel) -> Workload:
    """Texts that end early at times: token 7 ends a text."""
    target = make_model("llama", layers=1, vocabulary=40, hidden=16, context=128, eos_token_id=7)
    pair = Pair(target, make_noisy(target, 0.5), name="toy")
    prompts = TokenPrompts([[1, 2, 3], [4, 5], [6], [8, 9, 10, 11]], [[12, 13], [14]])
    return Workload(pair, prompts)


@pytest.fixture(scope="module")
def trace_path(work: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "toy.npz"
    record(work, "train", path, SETTINGS, profile=PROFILE)
    return path


@pytest.fixture
def trace(trace_path: Path) -> Trace:
    return Trace.load(trace_path)


def test_own_texts_are_the_targets(work: Workload, trace: Trace) -> None:
    decoder = AutoregressiveDecoder(work.load())
    assert trace.prompts == 3
    for place, prompt in enumerate(work.prompt_ids("train")[:3]):
        generation = decoder.generate(prompt, max_new_tokens=20)
        local = slice(int(trace.starts[place]), int(trace.starts[place + 1]))
        assert trace.text[local].tolist() == generation.tokens
        assert trace.ended[place] == (generation.finish_reason == "eos")
        assert trace.prompt_lengths[place] == len(prompt)
    assert trace.match[: len(trace.text)].any()
    assert not trace.match[: len(trace.text)].all()


def test_a_jump_leads_where_the_kept_tokens_and_the_targets_own_lead(trace: Trace) -> None:
    text = trace.text[: int(trace.starts[1])].tolist()
    led = 0
    for row in range(len(text)):
        for kept in range(int(trace.drafted[row]) + 1):
            goal = int(trace.jump[row, kept])
            if 0 <= goal < len(text):
                led += 1
                assert goal == row + kept + 1
                assert trace.tokens[row, :kept].tolist() == text[row : row + kept]
        run = int(trace.match[row].cumprod().sum())
        if row + run + 1 < len(text):
            assert trace.jump[row, run] == row + run + 1
    assert led > 10


def test_detours_are_the_texts_of_threshold_decoding(work: Workload, trace: Trace) -> None:
    decoder = ThresholdDecoder(work.load(), 4)
    decoder.charge_by(replace(PROFILE, chances=trace.chances))
    assert set(trace.detour_prompts.tolist()) == {0, 1}
    assert {tuple(knobs) for knobs in trace.detour_knobs.round(3).tolist()} == {
        (fallback, rollback) for fallback in trace_recorder.TOLERANCES for rollback in (1.0, 4.0)
    }
    prompts = work.prompt_ids("train")
    strayed = False
    for prompt, knobs, rows in zip(trace.detour_prompts, trace.detour_knobs, trace.detour_rows, strict=True):
        generation = decoder.generate(
            prompts[prompt],
            max_new_tokens=10,
            knobs={"fallback": round(knobs[0], 3), "rollback": knobs[1]},
            seed=prompt,
        )
        assert (rows >= 0).sum() == len(generation.tokens)
        local = np.arange(trace.starts[prompt], trace.starts[prompt + 1])[: len(generation.tokens)]
        text = trace.text[local].tolist()
        shared = next(
            (place for place, pair in enumerate(zip(text, generation.tokens, strict=False)) if pair[0] != pair[1]),
            len(text),
        )
        # Row t is about the text before token t, so the first row of a new text comes after the first new token.
        assert rows[: min(shared + 1, len(local))].tolist() == local[: shared + 1].tolist()
        strayed |= bool((rows >= len(trace.text)).any())
    assert strayed


def test_a_sampled_recording_has_no_jumps_and_other_texts_for_other_seeds(work: Workload, tmp_path: Path) -> None:
    sampled = replace(work, sampling=Sampling(1.0), name="sampled")
    first, again, other = (
        record(sampled, "train", tmp_path / f"{number}.npz", replace(SETTINGS, seed=seed), profile=PROFILE)
        for number, seed in enumerate((0, 0, 1))
    )
    assert (first.jump == -1).all()
    assert first.text.tolist() == again.text.tolist() != other.text.tolist()
    assert (first.q <= first.confidence + 1e-6).all()
    assert (first.q < first.confidence).any()


def test_a_trace_is_read_back_as_it_was_written(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "copy.npz")
    copied = Trace.load(tmp_path / "copy.npz")
    assert copied.info == trace.info
    for entry in fields(Trace):
        if entry.name == "chances":
            np.testing.assert_array_equal(copied.chances.kept, trace.chances.kept)
            np.testing.assert_array_equal(copied.chances.average, trace.chances.average)
        elif entry.name != "info":
            np.testing.assert_array_equal(getattr(copied, entry.name), getattr(trace, entry.name), err_msg=entry.name)


def test_real_numbers_keep_eight_bits(trace: Trace, tmp_path: Path) -> None:
    exact = np.random.default_rng(0).random(trace.p.shape, dtype=np.float32)
    replace(trace, p=exact).save(tmp_path / "rounded.npz")
    rounded = Trace.load(tmp_path / "rounded.npz").p
    np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=1e-7)
    assert (rounded != exact).any()


def test_a_trace_of_an_earlier_version_lacks_the_likeliest_of_ten_unless_its_draft_has_no_probabilities(
    trace: Trace, tmp_path: Path
) -> None:
    assert trace.top_ten is not None
    assert (trace.top_ten >= trace.confidence - 2**-8).all()
    replace(trace, top_ten=None).save(tmp_path / "earlier.npz")
    assert Trace.load(tmp_path / "earlier.npz").top_ten is None
    certain = replace(trace, entropy=np.zeros_like(trace.entropy), q=np.ones_like(trace.q), top_ten=trace.confidence)
    for number, written in enumerate((certain, replace(certain, top_ten=None))):
        written.save(tmp_path / f"{number}.npz")
        assert "top_ten" not in np.load(tmp_path / f"{number}.npz").files
        np.testing.assert_array_equal(Trace.load(tmp_path / f"{number}.npz").top_ten, trace.confidence)


def test_matched_tokens_are_kept_and_estimated_for_a_trace_of_an_earlier_version(trace: Trace, tmp_path: Path) -> None:
    assert not trace.matched.any()  # of a model
    shares = np.random.default_rng(0).integers(0, 4, trace.confidence.shape)
    certain = replace(trace, entropy=np.zeros_like(trace.entropy), confidence=(shares / 3).astype(np.float32))
    for name, matched in (("earlier", np.empty(0, np.int64)), ("known", shares + 300 * (shares > 2))):
        replace(certain, matched=matched).save(tmp_path / f"{name}.npz")
    assert "matched" not in np.load(tmp_path / "earlier.npz").files
    np.testing.assert_array_equal(Trace.load(tmp_path / "earlier.npz").matched, shares)
    np.testing.assert_array_equal(Trace.load(tmp_path / "known.npz").matched, np.where(shares > 2, 255, shares))


@pytest.mark.parametrize("what", ["own_text", "detours"])
def test_an_interrupted_recording_goes_on_where_it_stopped(
    work: Workload, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "toy.npz"
    real, recorded = getattr(trace_recorder._Texts, what), []

    def fails_at_the_third(self: Any, prompt: Any, *arguments: Any) -> Any:
        recorded.append(tuple(prompt))
        if len(recorded) == 3:
            raise NumericalError("power cut")
        return real(self, prompt, *arguments)

    monkeypatch.setattr(trace_recorder._Texts, what, fails_at_the_third)
    with pytest.raises(NumericalError):
        record(work, "train", path, SETTINGS, profile=PROFILE)
    assert not path.exists()
    resumed = record(work, "train", path, SETTINGS, profile=PROFILE)
    assert len(recorded) == 4  # the third prompt alone was tried twice
    assert recorded[2] == recorded[3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.npz"]
    np.testing.assert_array_equal(resumed.jump, trace.jump)
    np.testing.assert_array_equal(resumed.distance, trace.distance)


def test_parts_of_another_recording_are_refused(work: Workload, tmp_path: Path) -> None:
    parts = tmp_path / "toy.npz.parts"
    parts.mkdir()
    (parts / "recording.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds parts of another recording"):
        record(work, "train", tmp_path / "toy.npz", SETTINGS)


def test_a_pair_without_a_draft_is_refused(work: Workload, tmp_path: Path) -> None:
    alone = replace(work, pair=Pair(work.load().target, name="alone"), name="")
    with pytest.raises(ValueError, match="a trace needs a draft, and pair alone has none"):
        record(alone, "train", tmp_path / "alone.npz", SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts must be a whole number of at least 1"),
        ({"draft_length": 300}, "draft_length must be a whole number from 1 to 255"),
        ({"detour_prompts": -1}, "detour_prompts must be a whole number of at least 0"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        replace(SETTINGS, **change)


def test_test_prompts_are_recorded_by_the_chances_of_training_prompts(work: Workload, tmp_path: Path) -> None:
    few = replace(SETTINGS, detour_prompts=1)
    alone = record(work, "test", tmp_path / "alone.test.npz", few, profile=PROFILE)
    train = record(work, "train", tmp_path / "toy.train.npz", few, profile=PROFILE)
    beside = record(work, "test", tmp_path / "toy.test.npz", few, profile=PROFILE)
    np.testing.assert_array_equal(alone.chances.kept, train.chances.kept)
    np.testing.assert_array_equal(beside.chances.kept, train.chances.kept)
    assert not np.array_equal(train.match, beside.match)  # or it would not matter whose chances they are


def test_chances_of_a_trace_of_other_models_are_refused(work: Workload, trace: Trace, tmp_path: Path) -> None:
    other = replace(trace, info=replace(trace.info, draft_sha256="0" * 64))
    other.save(tmp_path / "toy.train.npz")
    with pytest.raises(TraceError, match=r"toy\.train\.npz is of other models or another sampling"):
        record(work, "test", tmp_path / "toy.test.npz", SETTINGS, profile=PROFILE)


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused_by_name(trace_path: Path, tmp_path: Path, kept: float) -> None:
    whole = trace_path.read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(TraceError, match=r"cut\.npz is damaged, or none .* record it again"):
        Trace.load(cut)


def test_a_flipped_bit_is_noticed(trace_path: Path, tmp_path: Path) -> None:
    damaged = bytearray(trace_path.read_bytes())
    with zipfile.ZipFile(trace_path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    damaged[largest.header_offset + largest.compress_size // 2] ^= 16  # in its data, which begins less than that behind
    (tmp_path / "flipped.npz").write_bytes(damaged)
    with pytest.raises(TraceError, match=r"flipped\.npz"):
        Trace.load(tmp_path / "flipped.npz")


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    with pytest.raises(TraceError, match=rf"foreign\.npz is no trace of this version \({FORMAT}\)"):
        Trace.load(tmp_path / "foreign.npz")
    np.savez(tmp_path / "pickled.npz", metadata=np.array([{"format": FORMAT}], dtype=object))
    with pytest.raises(TraceError, match=r"pickled\.npz"):
        Trace.load(tmp_path / "pickled.npz")
    with pytest.raises(TraceError, match=r"there is no trace .*missing\.npz"):
        Trace.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("starts", lambda values: values[::-1]),
        ("drafted", lambda values: values + 5),
        ("distance", lambda values: values * np.nan),
        ("jump", lambda values: values + len(values)),
        ("p", lambda values: values[:, :-1]),
        ("tokens", lambda values: values + 60),
        ("detour_rows", lambda values: values + 10_000),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(
    trace: Trace, tmp_path: Path, name: str, spoil: Callable[[Any], Any]
) -> None:
    replace(trace, **{name: spoil(getattr(trace, name))}).save(tmp_path / "spoilt.npz")
    with pytest.raises(TraceError, match=rf"spoilt\.npz is damaged \(.*{'token' if name == 'tokens' else name}"):
        Trace.load(tmp_path / "spoilt.npz")


def test_the_metadata_name_what_was_recorded(work: Workload, trace: Trace) -> None:
    info = trace.info
    assert (info.workload, info.split, info.temperature) == ("toy/ids", "train", 0.0)
    assert len(info.target_sha256) == len(info.draft_sha256) == len(info.prompts_sha256) == 64
    assert info.target_sha256 != info.draft_sha256
    assert (info.max_prompt_tokens, info.longest_prompt) == (None, 3)
    assert all(value not in (None, "") for name, value in asdict(info).items() if name != "max_prompt_tokens")
    assert trace_name("a/b+c/code@1.0", "test") == "a_b_c_code@1.0.test.npz"


def test_the_command_records_both_splits_and_leaves_finished_traces_alone(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record_module, "workload", lambda name: work)
    arguments = ["toy", "--out", str(tmp_path), "--draft-length", "3", "--prompts", "1", "--tokens", "4"]
    arguments += ["--detour-prompts", "0"]
    record_module.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.test.npz", "toy.train.npz"]
    assert Trace.load(tmp_path / "toy.test.npz").detour_rows.shape[0] == 0
    assert "1 prompts" in capsys.readouterr().out
    record_module.main(arguments)
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(SpecgymError, match="device must be cpu"):
        record_module.main([*arguments, "--device", "tpu"])
