"""Rises of a noisy number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.callbacks.schedules import Improvement


def test_waits_for_a_relative_rise_over_the_best() -> None:
    seen = Improvement(patience=2, threshold=0.1, smoothing=0.0)
    waiting = []
    for value in (10.0, 10.9, 11.1, 9.0, 12.0, 12.3):
        seen.update(value)
        waiting.append((seen.waiting, seen.exhausted))
    assert waiting == [(0, False), (1, False), (0, False), (1, False), (2, True), (0, False)]
    assert seen.best == 12.3


def test_a_rise_from_a_negative_best_is_one() -> None:
    seen = Improvement(patience=1, threshold=0.1, smoothing=0.0)
    for value in (-10.0, -9.5):
        seen.update(value)
    assert seen.waiting == 1
    seen.update(-8.9)
    assert seen.waiting == 0


def test_one_lucky_value_is_smoothed_away() -> None:
    seen = Improvement(patience=3, threshold=0.0, smoothing=0.75)
    for value in (4.0, 8.0):
        seen.update(value)
    assert seen.smoothed == pytest.approx((0.75 * 4 + 8) / 1.75)  # the first weighs no more than its share
    seen.update(4.0)
    assert seen.waiting == 1
    assert seen.best is not None
    assert seen.best < 8.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 30), st.floats(0, 0.99))
def test_goes_on_from_its_state_as_if_never_stopped(values: list[float], cut: int, smoothing: float) -> None:
    whole, first, second = (Improvement(3, 0.01, smoothing) for _ in range(3))
    for value in values:
        whole.update(value)
    for value in values[:cut]:
        first.update(value)
    second.restore(json.loads(json.dumps(first.state())))
    for value in values[cut:]:
        second.update(value)
    assert second.state() == whole.state()


@pytest.mark.parametrize(("name", "value"), [("patience", 0), ("threshold", -0.1), ("smoothing", 1.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    settings = {"patience": 1, "threshold": 0.0, "smoothing": 0.0, name: value}
    with pytest.raises(ValueError, match=name):
        Improvement(**settings)  # type: ignore[arg-type]
