"""Mixed traces: what is written and read back, how a shipped or recorded one is searched for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.envs import find_mixed_trace, find_trace, mixed_workloads
from specgym.envs.recordings import find
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.mixed_trace import MixedTrace
from specgym.envs.recordings.trace import Trace
from tests.helpers.made_up_mixed import made_up_mixed

EXACT = ("prompt_lengths", "starts", "ended", "text", "tokens", "drafted", "match", "matched", "jump")


@pytest.mark.parametrize("name", ["tiny/prose", "tiny/prose@1.0"])
def test_a_mixed_trace_is_read_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    trace = made_up_mixed(name)
    trace.save(tmp_path / "m.npz")
    copied = MixedTrace.load(tmp_path / "m.npz")
    assert (copied.info, copied.drafts, copied.free) == (trace.info, trace.drafts, trace.free)
    for ours, theirs in zip(trace.traces, copied.traces, strict=True):
        assert ours.info == theirs.info
        for column in EXACT:
            np.testing.assert_array_equal(getattr(theirs, column), getattr(ours, column), err_msg=column)
        for column in ("confidence", "q", "p"):
            np.testing.assert_allclose(getattr(theirs, column), getattr(ours, column), rtol=2**-8 + 2**-11, atol=1e-7)
        for column in ("entropy", "target_entropy", "distance", "top_ten"):
            np.testing.assert_allclose(getattr(theirs, column), getattr(ours, column), rtol=2**-5, atol=2**-7)
        assert np.abs(theirs.bins.astype(int) - ours.bins).max() <= 1  # of rounded confidences
    copied.save(tmp_path / "again.npz")
    again = MixedTrace.load(tmp_path / "again.npz")
    for ours, theirs in zip(copied.traces, again.traces, strict=True):
        for entry in fields(Trace):
            if entry.name not in ("info", "chances"):
                np.testing.assert_array_equal(getattr(theirs, entry.name), getattr(ours, entry.name), entry.name)


def test_shared_arrays_are_stored_once(tmp_path: Path) -> None:
    made_up_mixed().save(tmp_path / "m.npz")
    stored = np.load(tmp_path / "m.npz").files
    assert stored.count("text") == 1
    assert not any(name.endswith(("_text", "_starts", "_bins")) for name in stored)
    assert sum(name.endswith("_tokens") for name in stored) == 4


@pytest.mark.parametrize(
    ("pair", "alone"),
    [
        ("tiny-10m-mixed", ("tiny", "tiny-10m-2l", "tiny-10m-ngram", "tiny-10m-lookup")),
        ("tiny-3m-mixed", ("tiny-3m-1l", "tiny-3m-ngram", "tiny-3m-lookup")),
    ],
)
def test_what_ships_of_several_drafts_is_what_ships_of_each(pair: str, alone: tuple[str, ...]) -> None:
    mixed, _ = find_mixed_trace(None, f"{pair}/prose", "train")
    assert (*mixed.drafts[-1:], mixed.free[-1]) == ("suffix", True)
    for name, ours in zip(alone, mixed.traces, strict=False):
        theirs, _ = find_trace(None, f"{name}/prose", "train")
        rows = theirs.starts[min(theirs.prompts, ours.prompts)]
        length = ours.draft_length
        np.testing.assert_array_equal(ours.text[:rows], theirs.text[:rows])
        np.testing.assert_array_equal(ours.drafted[:rows], theirs.drafted[:rows].clip(max=length))
        for column in ("tokens", "match", "matched"):
            np.testing.assert_array_equal(getattr(ours, column)[:rows], getattr(theirs, column)[:rows, :length])
        np.testing.assert_allclose(ours.p[:rows], theirs.p[:rows, :length], rtol=2**-7, atol=1e-6)


def _with_first(trace: MixedTrace, **changes: Any) -> tuple[Trace, ...]:
    return (replace(trace.traces[0], **changes), *trace.traces[1:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda trace: _with_first(trace, text=(trace.first.text + 1) % 50), r"of the others \(with other text\)"),
        (
            lambda trace: (*trace.traces[:-1], made_up_mixed(prompts=3).traces[-1]),
            r"draft table-3 is not of the texts of the others \(with other prompt_lengths, starts, ended, text\)",
        ),
        (
            lambda trace: _with_first(trace, info=replace(trace.first.info, target_sha256="1")),
            r"draft model-0 .*with other target_sha256",
        ),
        (
            lambda trace: tuple(replace(draft, detour_prompts=np.zeros(1, np.int64)) for draft in trace.traces),
            "has detours",
        ),
        (lambda trace: trace.traces[:-1], "4 names, 4 times free or not, and 3 traces"),
        (lambda trace: (), "0 traces"),
    ],
)
def test_drafts_that_disagree_about_the_texts_are_refused(
    spoil: Callable[[MixedTrace], tuple[Trace, ...]], message: str
) -> None:
    trace = made_up_mixed()
    with pytest.raises(TraceError, match=message):
        replace(trace, traces=spoil(trace))


def test_a_trace_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    trace = made_up_mixed()
    trace.first.save(tmp_path / "single.npz")
    trace.save(tmp_path / "mixed.npz")
    with pytest.raises(TraceError, match=r"single\.npz is no mixed trace of this version \(specgym-mixed-trace-1\)"):
        MixedTrace.load(tmp_path / "single.npz")
    with pytest.raises(TraceError, match=r"mixed\.npz is no trace of this version"):
        Trace.load(tmp_path / "mixed.npz")


def test_a_mixed_trace_is_looked_up_by_its_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "MIXED", tmp_path)
    for split in ("train", "test"):
        made_up_mixed(split=split).save(tmp_path / f"tiny_prose.{split}.npz")
    trace, workload = find_mixed_trace(None, "tiny/prose", "test")
    assert (trace.info.split, workload.split, workload.name) == ("test", "test", "tiny/prose")
    assert mixed_workloads() == ("tiny/prose",)
    by_file, _ = find_mixed_trace(tmp_path / "tiny_prose.train.npz", None)
    assert by_file.info.split == "train"
    assert find_mixed_trace(trace, None)[0] is trace
    with pytest.raises(
        TraceError, match=r"no mixed trace of tiny/code .*shipped: tiny/prose\).*envs\.record 'tiny/code'"
    ):
        find_mixed_trace(None, "tiny/code")
    with pytest.raises(TraceError, match="has the test prompts of tiny/prose, not the train prompts"):
        find_mixed_trace(trace, None, "train")
    with pytest.raises(TraceError, match=r"recorded from tiny/prose, and the workload asked for is tiny/code"):
        find_mixed_trace(trace, "tiny/code")
    with pytest.raises(TraceError, match="name a workload or give a recording; shipped are: tiny/prose"):
        find_mixed_trace(None)
