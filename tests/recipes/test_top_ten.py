"""The recipe that adds a column to traces of an earlier version finds what a recording finds."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from recipes.top_ten import TopTenSettings, add_top_ten
from specgym.envs import Trace
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.find import TRACES

SMALL = RecordSettings(draft_length=4, prompts=2, tokens=40, detour_prompts=0)


def test_the_column_is_as_recorded_and_all_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "small.npz"
    trace = record("tiny-3m-1l/prose@0.7", "test", path, SMALL)
    assert trace.top_ten is not None
    replace(trace, top_ten=None).save(path)
    add_top_ten(TopTenSettings((path,)))
    again = Trace.load(path)
    assert again.top_ten is not None
    np.testing.assert_allclose(again.top_ten, trace.top_ten, rtol=2**-7)
    for name in (entry.name for entry in fields(Trace) if entry.name not in ("info", "chances", "top_ten")):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name), err_msg=name)
    replace(trace, top_ten=None, confidence=trace.confidence / np.float32(2)).save(path)
    with pytest.raises(TraceError, match=r"small\.npz: the draft is not as sure .* record it again"):
        add_top_ten(TopTenSettings((path,)))


def test_every_shipped_trace_has_it() -> None:
    assert [path.name for path in TRACES.glob("*.npz") if Trace.load(path).top_ten is None] == []
