"""Worlds: what is drawn, what settings are worth, and what measurements say of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specgym.decoding import ArgumentError, LatencyProfile, round_costs, sensible_deployments
from specgym.envs.workloads import workload
from specgym.envs.worlds.acceptance import LENGTHS, LONGEST, setting_of
from specgym.envs.worlds.catalogue import (
    AXES,
    HELD_OUT_BATCH_SIZES,
    HELD_OUT_CLASSES,
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPERATURES,
    Axis,
    KeptApart,
    charges,
    held_out_sampler,
    held_out_workloads,
    training_sampler,
    training_workloads,
)
from specgym.envs.worlds.pool import AcceptancePool
from specgym.envs.worlds.worlds import BATCH_SIZES, ENGINES, Charges, WorldSampler


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_charges_are_those_of_the_deployments() -> None:
    deployment = sensible_deployments(hardware=["h100-sxm"], contexts=[2048])[0]
    table = Charges.of([deployment])
    plain, step, target = round_costs(deployment, [4], LONGEST)
    column = BATCH_SIZES.index(4)
    assert table.labels.tolist() == [deployment.label]
    assert table.verify[0, column] == pytest.approx(target[0] / plain[0])
    assert table.draft[0, column] == pytest.approx(step[0] / plain[0])


def test_a_measured_profile_is_charged_at_its_batch_size_alone() -> None:
    draft, target = {0: 0.0, 16: 8e-4}, {1: 1.1e-3, 17: 1.6e-3}
    profile = LatencyProfile("a+b", draft, target, autoregressive_seconds=1e-3, hardware={})
    table = Charges.of([], [profile])
    assert table.fits.tolist() == [[True] + [False] * 8]
    assert table.draft[0, 0] == pytest.approx(0.05)
    assert table.verify[0, 0, [0, 16]] == pytest.approx([1.0, 1.5])  # nothing drafted is plain decoding
    assert table.begin[0, 0] == pytest.approx(0.1)
    late = Charges.of([], [replace(profile, draft_seconds={0: 0.0, 1: 2e-4, 16: 9.5e-4})])
    assert late.draft[0, 0] == pytest.approx(0.05)
    # What the first token costs beyond that, and a round without a draft beyond a plain token, is what drafting costs.
    assert late.begin[0, 0] == pytest.approx(0.15 + 0.1)
    assert late.verify[0, 0, [0, 16]] == pytest.approx([1.0, 1.5])
    with pytest.raises(ArgumentError, match=r"profile of a\+b: batch size 3 is none of"):
        Charges.of([], [replace(profile, batch_size=3)])


def test_draws_suit_their_engines(sampler: WorldSampler) -> None:
    worlds = sampler.draw(3000, rng())
    for place, engine in enumerate(ENGINES):
        mine = worlds.engine == place
        assert mine.mean() == pytest.approx(1 / len(ENGINES), abs=0.05)
        if not engine.batches:
            assert set(worlds.batch_size[mine].tolist()) == {1}
        if engine.stop:
            assert set(sampler.pool.before[worlds.acceptance[mine]].tolist()) == {engine.stop == "before"}
    batched = worlds.batch_size[np.array([engine.batches for engine in ENGINES])[worlds.engine]]
    assert set(batched.tolist()) == set(BATCH_SIZES)
    column = np.searchsorted(BATCH_SIZES, worlds.batch_size)
    assert sampler.charges.fits[worlds.deployment, column].all()
    assert np.isfinite(worlds.costs).all()
    assert (np.diff(worlds.costs[:, : LONGEST + 1], axis=1) > -1e-12).all()
    assert (worlds.costs[:, LONGEST + 1 :] >= 0).all()


def test_not_speculating_is_worth_1_and_engines_lack_what_they_cannot_set(sampler: WorldSampler) -> None:
    worlds = sampler.draw(200, rng())
    speedups = worlds.speedups()
    assert speedups[:, setting_of(0, 0.0)] == pytest.approx(1.0, rel=1e-5)
    assert worlds.fixed.any()
    assert (speedups[worlds.fixed, len(LENGTHS) :] == 0).all()
    assert (speedups[~worlds.fixed] > 0).all()


def test_measurements_are_right_on_average(sampler: WorldSampler) -> None:
    worlds = sampler.draw(1, rng(4)).taken(np.zeros(4000, np.int64))
    setting = np.full(4000, setting_of(4, 0.0))
    readings = worlds.measure(np.arange(4000), setting, rng(5))
    pool, place = sampler.pool, int(worlds.acceptance[0])
    rounds = pool.drafts[place, setting[0]].sum(0, dtype=np.int64)
    expected = pool.tokens[place].sum() / (rounds * worlds.costs[0]).sum()
    # A ratio of sums over few texts is biased a little, and the noise's mean is not quite 1.
    assert readings.speedup.mean() == pytest.approx(expected, rel=0.02)
    assert readings.speedup.std() > 0.5 * worlds.noise[0] * expected
    assert (readings.kept <= readings.reached).all()
    assert readings.judged.sum(1).tolist() == readings.reached.sum(1).tolist()
    assert readings.passed.sum(1).tolist() == readings.kept.sum(1).tolist()


def test_worlds_are_put_and_taken_row_by_row(sampler: WorldSampler) -> None:
    worlds, others = sampler.draw(5, rng(0)), sampler.draw(2, rng(1))
    before = worlds.taken(np.array([0, 2, 4]))
    worlds.put(np.array([1, 3]), others)
    assert np.array_equal(worlds.taken(np.array([1, 3])).costs, others.costs)
    assert np.array_equal(worlds.taken(np.array([0, 2, 4])).costs, before.costs)
    assert len(worlds) == 5


def test_nothing_left_to_draw_is_refused(sampler: WorldSampler) -> None:
    with pytest.raises(ArgumentError, match="no world is left to draw for transformers: hold out less"):
        replace(sampler, deployments=np.zeros_like(sampler.deployments))
    assert set(replace(sampler, batch_sizes=(4,), engines=("vllm",)).draw(50, rng()).batch_size.tolist()) == {4}


def test_what_is_held_out_is_in_no_world_of_training(sampler: WorldSampler) -> None:
    names = training_workloads()
    assert names
    assert not set(names) & set(held_out_workloads())
    worlds = training_sampler(2, names=names[:2]).draw(2000, rng())
    assert not np.isin(charges().classes[worlds.deployment], HELD_OUT_CLASSES).any()
    assert not np.isin(charges().labels[worlds.deployment], HELD_OUT_PAIRS).any()
    assert not np.isin(worlds.batch_size, HELD_OUT_BATCH_SIZES).any()
    named = [workload(name) for name in names]
    assert not {str(chosen.pair) for chosen in named} & set(HELD_OUT_PAIRS)
    assert not {chosen.sampling.temperature for chosen in named} & set(HELD_OUT_TEMPERATURES)


@pytest.mark.parametrize("axis", AXES)
def test_worlds_of_an_axis_have_what_it_names(axis: Axis) -> None:
    kept = KeptApart.on(axis)
    named = [workload(name) for name in kept.names]
    assert len(named) > 0
    labels, classes = charges().labels[kept.deployments], charges().classes[kept.deployments]
    kinds = {
        "pair": [str(chosen.pair) in HELD_OUT_PAIRS for chosen in named],
        "hardware": np.isin(classes, HELD_OUT_CLASSES).tolist(),
        "batch size": np.isin(kept.batch_sizes, HELD_OUT_BATCH_SIZES).tolist(),
        "temperature": [chosen.sampling.temperature in HELD_OUT_TEMPERATURES for chosen in named],
    }
    for name, holds in kinds.items():
        assert holds
        assert set(holds) == {name == axis or axis == "all"}, name
    assert np.isin(HELD_OUT_PAIRS, labels).any() == (axis == "pair")
    assert kept.warped == (axis in ("acceptance", "hardware", "batch size"))


def test_worlds_with_everything_new_can_be_drawn() -> None:
    worlds = held_out_sampler("all").draw(50, rng())
    assert set(worlds.temperature.tolist()) <= set(HELD_OUT_TEMPERATURES)
    assert set(worlds.batch_size.tolist()) <= {1, *HELD_OUT_BATCH_SIZES}


def test_a_token_that_is_thrown_away_costs_its_draft(sampler: WorldSampler) -> None:
    """With the same rounds, a rule that stops before a token pays for more drafting than it verifies."""
    pool = AcceptancePool.recorded(["tiny-3m-1l/definitions"])
    before = int(np.flatnonzero(pool.before)[0])
    setting = int(setting_of(16, 0.6))
    thrown, idle = pool.rounds[..., LONGEST + 1], pool.rounds[..., LONGEST + 2]
    assert thrown[before, setting] > idle[before, setting] > 0
    assert (thrown[~pool.before] == 0).all()
    assert (thrown[before, : len(LENGTHS)] == 0).all()  # without a threshold no rule ends a draft
    alone = replace(sampler, pool=pool, engines=("llama.cpp",))
    worlds = alone.draw(30, rng())
    for column in (LONGEST + 1, LONGEST + 2):
        free = worlds.taken(np.arange(30))
        free.costs[:, column] = 0
        assert (free.speedups()[:, setting] > worlds.speedups()[:, setting]).all()
