import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.rounds import Round
from tests.helpers.sealing import reseal

PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.1, 4: 0.7}, {1: 1.0, 3: 2.0, 5: 2.5}, 0.9, {"device": "imaginary"})
SIZES, CONTEXTS = (1, 4, 8), (10, 50)


def point(batch_size: int, context: int, **changes: Any) -> LatencyProfile:
    """Linear in tokens; between two batch sizes or two contexts the times differ by more than a factor."""
    base, token = 1.0 + batch_size**2 + context, 0.1 * batch_size * context
    ordinary: dict[str, Any] = {
        "draft_seconds": {0: 0.0, 4: 4 * token},
        "target_seconds": {1: base + token, 5: base + 5 * token},
        "autoregressive_seconds": base,
        "batch_size": batch_size,
        "context": context,
    }
    return replace(PROFILE, **(ordinary | changes))


PLACES = [(size, context) for size in SIZES for context in CONTEXTS]
GRID = replace(point(*PLACES[0]), points=tuple(point(*place) for place in PLACES[1:]))


def round_of(drafted: int) -> Round:
    return Round((1,), drafted, 0, 0.0, 0.0, 0.0)


def test_measured_numbers_are_returned_as_they_are() -> None:
    assert [PROFILE.draft(tokens) for tokens in (0, 1, 4)] == [0.0, 0.1, 0.7]
    assert [PROFILE.target(tokens) for tokens in (1, 3, 5)] == [1.0, 2.0, 2.5]


def test_between_measured_numbers_time_is_linear() -> None:
    assert PROFILE.draft(2) == pytest.approx(0.3)
    assert PROFILE.target(2) == pytest.approx(1.5)
    assert PROFILE.target(4) == pytest.approx(2.25)


def test_beyond_the_last_two_time_goes_on_linearly() -> None:
    assert PROFILE.target(9) == pytest.approx(3.5)
    assert PROFILE.draft(5) == pytest.approx(0.9)


def test_below_the_first_measured_number_time_is_never_negative() -> None:
    assert replace(PROFILE, draft_seconds={2: 0.1, 4: 0.5}).draft(0) == 0.0


def test_a_single_measured_number_stands_for_all() -> None:
    assert replace(PROFILE, draft_seconds={0: 0.25}).draft(7) == 0.25


@given(st.lists(st.integers(0, 40), max_size=8))
def test_rounds_are_charged_for_what_they_drafted(drafted: list[int]) -> None:
    expected = sum(PROFILE.draft(count) + PROFILE.target(count + 1) for count in drafted)
    assert PROFILE.charge([round_of(count) for count in drafted]) == pytest.approx(expected)


def test_rounds_that_overlap_take_the_longer_time_and_what_was_awaited() -> None:
    profile = replace(PROFILE, overlaps=True, kind="together")

    def charged(steps: int, tokens: int, awaited: int = 0) -> float:
        seconds = profile.charge(
            [Round((1,), 1, 0, 0, 0, 0, draft_steps=steps, target_tokens=tokens, awaited_steps=awaited)]
        )
        if not awaited:
            assert profile.rounds_of(np.array([steps]), np.array([tokens]))[0] == seconds
        return seconds

    assert charged(1, 3) == 2.0  # the pass takes longer
    assert charged(16, 1) == profile.draft(16) > 1.0  # and here the draft
    assert charged(4, 3, awaited=3) == pytest.approx(profile.draft(3) + 2.0)
    assert charged(0, 3) == 2.0  # the draft's tokens were of no use, but it was at work
    assert charged(0, 1) == 0.9  # nobody else was


def test_rounds_that_draft_nothing_are_charged_for_all_that_the_target_read() -> None:
    whole = replace(PROFILE, kind="lookahead", draft_seconds={0: 0.0})
    read = [Round((1, 2), 4, 1, 0.0, 0.0, 0.0, draft_steps=0, target_tokens=tokens) for tokens in (1, 5, 9)]
    assert whole.charge(read) == pytest.approx(1.0 + 2.5 + 3.5)


@pytest.mark.parametrize(("kind", "other"), [("chain", "lookahead"), ("lookahead", "chain")])
def test_a_profile_of_another_kind_of_rounds_is_refused_with_the_way_out(kind: str, other: str) -> None:
    result = replace(PROFILE, kind=kind)
    assert result.require_kind(kind) is result
    with pytest.raises(LatencyProfileError, match=f"of toy was made for {kind} rounds, and {other} rounds") as caught:
        result.require_kind(other)
    way_out = "measured(pair), or" if other == "chain" else "measured(pair, decoder), or"
    assert way_out in str(caught.value)
    assert str(caught.value).endswith("WORKLOAD" if other == "chain" else f"--decoder {other}")


@pytest.mark.parametrize(("method", "tokens"), [("draft", -1), ("target", 0), ("round", -1)])
def test_impossible_numbers_of_tokens_are_refused(method: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"at least . tokens, got {tokens}"):
        getattr(PROFILE, method)(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_seconds": {}}, "draft_seconds must have an entry"),
        ({"target_seconds": {0: 1.0}}, "none below 1 tokens"),
        ({"target_seconds": {1: 0.0}}, r"target_seconds\[1\] is 0.0"),
        ({"draft_seconds": {1: float("nan")}}, r"draft_seconds\[1\] must be a finite number of at least 0, got nan"),
        ({"autoregressive_seconds": 0.0}, "autoregressive_seconds must be a finite number above 0, got 0.0"),
        ({"kind": ""}, "kind must be the name of a cost kind, got ''"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LatencyProfileError, match=message):
        replace(PROFILE, **changes)


@pytest.mark.parametrize("rounds", ["chain", "lookahead"])
def test_a_saved_profile_comes_back_equal(tmp_path: Path, rounds: str) -> None:
    path = tmp_path / "new" / "profile.json"
    saved = replace(PROFILE, kind=rounds)
    saved.save(path)
    assert LatencyProfile.load(path) == saved
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list where an object was expected"),
        ('{"format": "something else"}', "is not a latency profile of this version"),
        ('{"format": "specgym-latency-2", "pair": "p"}', "is not a latency profile of this version"),
        ('{"format": "specgym-latency-3"}', "is damaged"),
        (
            '{"format": "specgym-latency-3", "pair": "p", "draft_seconds": [], "target_seconds": [[1, 1.0]], '
            '"autoregressive_seconds": 1.0, "hardware": {}, "sampling": "greedy", "rounds": "chain", "points": []}',
            "is damaged .*draft_seconds must have an entry",
        ),
    ],
)
def test_foreign_and_damaged_files_are_refused_with_a_way_out(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(LatencyProfileError, match=message) as caught:
        LatencyProfile.load(path)
    assert "measure it again" in str(caught.value)
    assert "profile.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyProfileError, match="there is no latency profile"):
        LatencyProfile.load(tmp_path / "none.json")


def test_the_cost_of_rounds_is_a_table_by_drafted_tokens() -> None:
    table = PROFILE.round_seconds(6)
    assert table.shape == (7,)
    assert table.dtype == np.float64
    assert table.tolist() == [PROFILE.round(drafted) for drafted in range(7)]


def test_the_marginal_cost_is_the_slope_of_a_round_over_plain_decoding() -> None:
    straight = replace(PROFILE, draft_seconds={0: 0.0, 8: 0.8}, target_seconds={1: 1.0, 9: 3.0})
    assert straight.marginal_cost() == pytest.approx((0.1 + 0.25) / 0.9)


def test_the_marginal_cost_beside_a_pass_is_that_of_drafting() -> None:
    beside = replace(
        PROFILE, kind="beside", overlaps=True, draft_seconds={1: 0.3, 9: 1.1}, target_seconds={1: 5.0, 9: 7.0}
    )
    assert beside.marginal_cost() == pytest.approx(0.1 / 0.9)


def test_the_marginal_cost_leaves_the_round_without_a_draft_out() -> None:
    dear_to_begin = replace(PROFILE, draft_seconds={0: 0.0, 1: 5.0, 4: 5.3}, target_seconds={1: 1.0, 5: 1.0})
    assert dear_to_begin.marginal_cost() == pytest.approx(0.1 / 0.9)


def test_the_marginal_cost_goes_no_further_than_was_measured_nor_than_sixteen() -> None:
    short = replace(PROFILE, draft_seconds={0: 0.0}, target_seconds={1: 1.0, 3: 2.0, 4: 4.0})
    assert short.marginal_cost() == pytest.approx((4.0 - 1.5) / 2 / 0.9)
    long = replace(PROFILE, draft_seconds={0: 0.0}, target_seconds={1: 1.0, 17: 17.0, 40: 1000.0})
    assert long.marginal_cost() == pytest.approx(1 / 0.9)


def test_the_marginal_cost_is_known_from_two_numbers_and_never_negative() -> None:
    assert replace(PROFILE, draft_seconds={0: 0.0}, target_seconds={1: 1.0, 2: 1.5}).marginal_cost() > 0
    assert replace(PROFILE, draft_seconds={0: 0.0}, target_seconds={1: 1.0, 9: 0.9}).marginal_cost() == 0
    assert replace(PROFILE, draft_seconds={0: 0.0}, target_seconds={1: 1.0}).marginal_cost() == 0


@pytest.mark.parametrize(("batch_size", "context"), PLACES)
def test_a_point_of_the_grid_is_returned_as_it_was_measured(batch_size: int, context: int) -> None:
    assert GRID.at(batch_size=batch_size, context=context) == point(batch_size, context)


def test_the_context_is_the_profiles_own_unless_it_is_given() -> None:
    assert GRID.at() == point(1, 10)
    assert GRID.at(batch_size=4) == point(4, 10)


def test_between_batch_sizes_time_is_linear() -> None:
    result, low, high = GRID.at(batch_size=5, context=50), point(4, 50), point(8, 50)
    assert (result.batch_size, result.context, result.points) == (5, 50, ())
    for tokens in range(1, 8):
        assert result.target(tokens) == pytest.approx(0.75 * low.target(tokens) + 0.25 * high.target(tokens))
        assert result.draft(tokens) == pytest.approx(0.75 * low.draft(tokens) + 0.25 * high.draft(tokens))
    assert result.autoregressive_seconds == pytest.approx(
        0.75 * low.autoregressive_seconds + 0.25 * high.autoregressive_seconds
    )


@given(st.integers(1, 8), st.integers(10, 50), st.integers(0, 9))
def test_time_is_linear_in_the_context_at_every_batch_size(batch_size: int, context: int, drafted: int) -> None:
    short, long = (GRID.at(batch_size=batch_size, context=end).round(drafted) for end in CONTEXTS)
    share = (context - 10) / 40
    assert GRID.at(batch_size=batch_size, context=context).round(drafted) == pytest.approx(
        (1 - share) * short + share * long
    )


@pytest.mark.parametrize("place", [(9, 10), (16, 50), (1, 9), (1, 51)])
def test_points_outside_the_grid_are_refused_with_what_is_known(place: tuple[int, int]) -> None:
    with pytest.raises(LatencyProfileError, match="batch sizes 1 to 8 and contexts 10 to 50") as caught:
        GRID.at(batch_size=place[0], context=place[1])
    assert f"batch size {place[0]} and context {place[1]}" in str(caught.value)
    assert "measure(pair, batch_sizes=" in str(caught.value)


def test_a_lookahead_profile_is_not_sent_for_batches_that_cannot_be_measured() -> None:
    with pytest.raises(LatencyProfileError, match=r"measure\(pair, decoder, contexts=...\), or compute one"):
        replace(point(1, 10), kind="lookahead").at(batch_size=2)


def test_without_a_grid_only_the_profiles_own_point_is_known() -> None:
    assert point(4, 10).at(batch_size=4, context=10) == point(4, 10)
    assert PROFILE.at() == PROFILE
    with pytest.raises(LatencyProfileError, match="covers batch size 4 and context 10"):
        point(4, 10).at()
    with pytest.raises(LatencyProfileError, match="batch size 1 and no context but its own"):
        PROFILE.at(context=10)
    with pytest.raises(LatencyProfileError, match="no point at batch size 2"):
        PROFILE.at(batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": GRID.points[1:]}, "no full grid; give every batch size with every context"),
        ({"points": (*GRID.points, point(1, 10))}, "no full grid"),
        ({"points": (*GRID.points[:-1], point(4, 10))}, "no full grid"),
        ({"context": None}, "every point of a grid has a context"),
        ({"points": (GRID,)}, "no point has points of its own"),
        ({"points": (point(2, 10, target_seconds={2: 1.0}),)}, "share no number of tokens in target_seconds"),
        ({"points": (point(2, 10, kind="lookahead"),)}, "the points must be of chain rounds"),
        ({"batch_size": 0, "points": ()}, "batch_size must be a whole number of at least 1, got 0"),
        ({"context": 0, "points": ()}, "context must be a whole number of at least 1, got 0"),
    ],
)
def test_grids_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LatencyProfileError, match=message):
        replace(GRID, **changes)


def test_points_that_were_measured_at_different_lengths_meet_where_both_were() -> None:
    other = point(2, 10, target_seconds={1: 3.0, 3: 5.0, 5: 9.0})
    result = replace(point(1, 10), points=(point(3, 10), other)).at(batch_size=2)
    assert result == other
    between = replace(point(1, 10), points=(replace(other, batch_size=3),)).at(batch_size=2)
    assert between.target_seconds == {1: (13.0 + 3.0) / 2, 5: (17.0 + 9.0) / 2}


def test_a_saved_grid_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    GRID.save(path)
    assert LatencyProfile.load(path) == GRID


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content["points"][0].pop("target_seconds"), "target_seconds"),
        (lambda content: content["points"].pop(), "no full grid"),
        (
            lambda content: content["points"][0].update(autoregressive_seconds=math.nan),
            "autoregressive_seconds must be a finite number above 0, got nan",
        ),
        (lambda content: content["points"][0].update(batch_size=1.5), "whole number"),
        (
            lambda content: content["points"][0]["draft_seconds"].append([7, -1.0]),
            r"draft_seconds\[7\] must be .*, got -1\.0",
        ),
        (lambda content: content["points"][0].update(colour="red"), "colour"),
        (lambda content: content.update(points=[3]), "int"),
        (lambda content: content.pop("hardware"), "hardware"),
        (lambda content: content.pop("rounds"), "rounds"),
        (lambda content: content.update(rounds=3), "kind must be the name of a cost kind"),
        (lambda content: content.update(hardware=[3]), "hardware"),
    ],
)
def test_a_damaged_grid_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "profile.json"
    GRID.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    reseal(path)
    with pytest.raises(LatencyProfileError, match=f"profile.json is damaged .*{message}"):
        LatencyProfile.load(path)
