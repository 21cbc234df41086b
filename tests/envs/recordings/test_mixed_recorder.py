"""Recording several drafts at once: as each would be recorded alone, in parts, and by the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from specgym.decoding import (
    Drafter,
    LanguageModel,
    ModelDrafter,
    NGramDrafter,
    NumericalError,
    Pair,
    PromptLookupDrafter,
    Sampling,
)
from specgym.envs import TokenPrompts, Workload
from specgym.envs import record as record_module
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.mixed_recorder import record_mixed
from specgym.envs.recordings.mixed_trace import MixedTrace
from specgym.envs.recordings.own_texts import OwnTexts

SETTINGS = RecordSettings(draft_length=4, prompts=3, tokens=40, detour_prompts=0)  # more tokens than a stretch
EXACT = ("prompt_lengths", "starts", "ended", "text", "tokens", "drafted", "match", "matched", "jump")
COARSE = ("entropy", "target_entropy", "distance", "top_ten")
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> LanguageModel:
    """A model whose texts end early at times: token 7 ends a text."""
    return LanguageModel(make_model("llama", layers=1, vocabulary=40, hidden=16, context=128, eos_token_id=7))


@pytest.fixture(scope="module")
def drafts(target: LanguageModel, make_noisy: MakeModel) -> list[Drafter]:
    models = [LanguageModel(make_noisy(target.model, noise), prepack=False) for noise in (0.2, 0.5)]
    rng = np.random.default_rng(0)
    table = NGramDrafter.fit([rng.integers(0, 40, 60).tolist()], 40, order=3)
    return [*map(ModelDrafter, models), table, PromptLookupDrafter(40)]


def work_of(target: LanguageModel, draft: Any, sampling: Sampling, name: str = "toy/ids") -> Workload:
    prompts = TokenPrompts([[1, 2, 3, 1, 2], [4, 5], [6], [8, 9, 10, 11]], [[12, 13], [14]])
    return Workload(Pair(target, draft, name="toy"), prompts, sampling, name)


@pytest.fixture(scope="module")
def mixed(target: LanguageModel, drafts: list[Drafter]) -> Workload:
    return work_of(target, drafts, Sampling(0.0))


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, top_k=20)], ids=["greedy", "sampled"])
def test_several_drafts_are_recorded_as_each_would_be_alone(
    target: LanguageModel, drafts: list[Drafter], sampling: Sampling, tmp_path: Path
) -> None:
    together = record_mixed(work_of(target, drafts, sampling), "train", tmp_path / "m.npz", SETTINGS)
    assert together.drafts == tuple(draft.name for draft in drafts)
    assert together.free == (False, False, True, True)
    for place, draft in enumerate(drafts):
        alone = record(work_of(target, draft, sampling), "train", tmp_path / f"{place}.npz", SETTINGS)
        beside = together.traces[place]
        assert beside.info == alone.info
        for name in EXACT:
            np.testing.assert_array_equal(getattr(beside, name), getattr(alone, name), err_msg=name)
        for name in ("confidence", "q", "p"):
            np.testing.assert_allclose(getattr(beside, name), getattr(alone, name), rtol=2**-7, atol=1e-6, err_msg=name)
        for name in COARSE:
            np.testing.assert_allclose(
                getattr(beside, name), getattr(alone, name), rtol=2**-4, atol=2**-7, err_msg=name
            )
        np.testing.assert_allclose(beside.chances.kept, alone.chances.kept, rtol=2**-10)
    assert not np.array_equal(together.traces[0].match, together.traces[1].match)


def test_chances_of_test_prompts_are_those_of_training_prompts(mixed: Workload, tmp_path: Path) -> None:
    alone = record_mixed(mixed, "test", tmp_path / "alone.test.npz", SETTINGS)
    train = record_mixed(mixed, "train", tmp_path / "toy.train.npz", SETTINGS)
    beside = record_mixed(mixed, "test", tmp_path / "toy.test.npz", SETTINGS)
    for ours, theirs, third in zip(alone.traces, train.traces, beside.traces, strict=True):
        np.testing.assert_array_equal(ours.chances.kept, theirs.chances.kept)
        np.testing.assert_array_equal(third.chances.kept, theirs.chances.kept)


def test_an_interrupted_recording_goes_on_where_it_stopped(
    mixed: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record_mixed(mixed, "train", tmp_path / "whole.npz", SETTINGS)
    real, recorded = OwnTexts.of_each, []

    def fails_at_the_third(self: Any, prompt: Any, *arguments: Any) -> Any:
        recorded.append(tuple(prompt))
        if len(recorded) == 3:
            raise NumericalError("power cut")
        return real(self, prompt, *arguments)

    monkeypatch.setattr(OwnTexts, "of_each", fails_at_the_third)
    with pytest.raises(NumericalError):
        record_mixed(mixed, "train", tmp_path / "toy.npz", SETTINGS)
    resumed = record_mixed(mixed, "train", tmp_path / "toy.npz", SETTINGS)
    assert recorded[2:] == [recorded[2]] * 2  # the third prompt alone was tried twice
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["toy.npz", "whole.npz"]
    for ours, theirs in zip(whole.traces, resumed.traces, strict=True):
        np.testing.assert_array_equal(theirs.p, ours.p)


def test_a_mixed_pair_has_no_trace_of_one_draft(mixed: Workload, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"pair toy has several drafts, and a trace is of one: .*record_mixed"):
        record(mixed, "train", tmp_path / "toy.npz", SETTINGS)


def test_the_command_records_all_drafts_and_refuses_detours_of_them(
    mixed: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record_module, "workload", lambda name: mixed)
    arguments = ["toy", "--out", str(tmp_path), "--draft-length", "3", "--prompts", "1", "--tokens", "4"]
    with pytest.raises(TraceError, match="--detour-prompts: toy has several drafts"):
        record_module.main([*arguments, "--detour-prompts", "2"])
    assert not any(tmp_path.iterdir())
    record_module.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.test.npz", "toy.train.npz"]
    assert MixedTrace.load(tmp_path / "toy.test.npz").info.split == "test"
    printed = capsys.readouterr().out
    assert all(draft.name in printed for draft in mixed.load().draft.drafts)  # type: ignore[union-attr]
    record_module.main(arguments)
    assert capsys.readouterr().out.count("is there already") == 2


def test_a_single_draft_may_be_recorded_as_a_mixed_one(
    target: LanguageModel, drafts: list[Drafter], tmp_path: Path
) -> None:
    single = work_of(target, drafts[0], Sampling(0.0))
    trace = record_mixed(single, "train", tmp_path / "m.npz", replace(SETTINGS, prompts=1, tokens=4))
    assert trace.drafts == (drafts[0].name,)
