"""Recordings and the length of their prompts: what they say of it, and for whom they are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.decoding import Pair, load_prompts, prompts_limited
from specgym.envs import TokenPrompts, TraceError, Workload, find_recording
from specgym.envs import record as record_module
from specgym.envs.recordings.find import recorded_workloads, shipped_outcomes
from specgym.envs.recordings.outcomes import Outcomes
from specgym.envs.recordings.trace import Trace


def _recorded(trace: Trace, **known: Any) -> Trace:
    return replace(trace, info=replace(trace.info, **known))


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [((None, 100), 100), ((100, 100), None), ((100, 90), 95), ((64, 100), 64), ((None, 100), None)],
)
def test_prompts_cut_alike_are_the_same(
    toy_trace: Trace, toy_workload: Workload, recorded: tuple[int | None, int], asked: int | None
) -> None:
    trace = _recorded(toy_trace, max_prompt_tokens=recorded[0], longest_prompt=recorded[1])
    asking = replace(toy_workload, max_prompt_tokens=asked)
    assert find_recording("threshold", trace, asking) == (trace, asking)


@pytest.mark.parametrize(
    ("recorded", "asked", "message"),
    [
        ((64, 100), None, "of at most 64 tokens, and asked for are prompts whole; give max_prompt_tokens=64 (--max-"),
        ((None, 100), 64, "whole, and asked for are prompts of at most 64 tokens; leave out max_prompt_tokens"),
        ((64, 100), 32, "of at most 64 tokens, and asked for are prompts of at most 32 tokens; give"),
    ],
)
def test_prompts_cut_otherwise_are_refused_with_both_lengths(
    toy_trace: Trace, toy_workload: Workload, recorded: tuple[int | None, int], asked: int | None, message: str
) -> None:
    trace = _recorded(toy_trace, max_prompt_tokens=recorded[0], longest_prompt=recorded[1])
    with pytest.raises(TraceError, match=re.escape(message)):
        find_recording("threshold", trace, replace(toy_workload, max_prompt_tokens=asked))
    with prompts_limited(asked), pytest.raises(TraceError, match=re.escape(message)):
        find_recording("threshold", trace, toy_workload)


@pytest.mark.parametrize(("longest", "refused"), [(127, False), (128, True)])
def test_an_earlier_trace_is_whole_where_no_prompt_reaches_its_cut(
    toy_trace: Trace, toy_workload: Workload, longest: int, refused: bool
) -> None:
    earlier = _recorded(toy_trace, max_prompt_tokens=128, longest_prompt=None)
    earlier = replace(earlier, prompt_lengths=np.array([1, longest, 3, 4]))
    assert find_recording("threshold", earlier, replace(toy_workload, max_prompt_tokens=128))[0] is earlier
    if refused:
        with pytest.raises(TraceError, match=r"record it with that length: .*specgym\.envs\.record"):
            find_recording("threshold", earlier, toy_workload)
    else:
        assert find_recording("threshold", earlier, toy_workload)[0] is earlier


def test_earlier_outcomes_are_whole_where_models_and_prompts_ship() -> None:
    name = recorded_workloads("lookahead")[0]
    earlier = shipped_outcomes(name, "lookahead", "train")
    assert find_recording("lookahead", earlier, name)[0] is earlier
    with pytest.raises(TraceError, match="leave out max_prompt_tokens"), prompts_limited(16):
        find_recording("lookahead", None, name)
    of_others = Outcomes(
        replace(earlier.info, workload="toy/ids", max_prompt_tokens=128, longest_prompt=None),
        *(getattr(earlier, name) for name in Outcomes.__dataclass_fields__ if name != "info"),
    )
    other = Workload("tiny", "prose", name="toy/ids")
    with pytest.raises(TraceError, match="--max-prompt-tokens 128"):
        find_recording("lookahead", of_others, other)
    assert find_recording("lookahead", of_others, replace(other, max_prompt_tokens=128))[0] is of_others


def test_a_recording_without_a_workload_gives_one_of_its_length(toy_trace: Trace) -> None:
    trace = _recorded(toy_trace, max_prompt_tokens=64, longest_prompt=100, workload="a@b/c/d.txt@1.0", temperature=1.0)
    named = find_recording("threshold", trace, None)[1]
    assert (named.pair, named.prompts, named.max_prompt_tokens) == ("a@b/c", "d.txt", 64)


def test_the_command_cuts_what_is_asked_for_and_writes_the_length(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = Workload(pair, TokenPrompts([list(range(1, 20)), [5, 6]], [[7]]))
    monkeypatch.setattr(record_module, "workload", lambda name: work)
    amount = ["--splits", "train", "--detour-prompts", "0", "--tokens", "4", "--draft-length", "4"]
    record_module.main(["toy/ids", "--out", str(tmp_path), *amount, "--max-prompt-tokens", "8"])
    trace = Trace.load(tmp_path / "toy_ids.train.npz")
    assert trace.prompt_lengths.tolist() == [8, 2]
    assert (trace.info.max_prompt_tokens, trace.info.longest_prompt) == (8, 19)
    assert "1 of 2 train prompts, of up to 19 tokens, are cut to 8, the max_prompt_tokens asked for" in caplog.text


def test_prompts_that_have_changed_since_are_refused(toy_trace: Trace, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one\ntwo\nthree")
    name = f"tiny-3m/{file}"
    prompts = load_prompts(str(file))
    trace = _recorded(toy_trace, workload=name, prompts_sha256=prompts.digest)
    assert find_recording("threshold", trace, name)[0] is trace
    file.write_text("one\ntwo\nthree ")
    with pytest.raises(TraceError, match=r"other prompts than .*mine\.txt has now.*record it again"):
        find_recording("threshold", trace, name)
    assert find_recording("threshold", trace, Workload(pair, prompts, name=name))[0] is trace
    assert find_recording("threshold", trace, None)[1].prompts == str(file)  # nobody asks for the prompts of today
    file.unlink()
    trace = _recorded(trace, workload="tiny-3m/lambada")
    assert find_recording("threshold", trace, "tiny-3m/lambada")[0] is trace
