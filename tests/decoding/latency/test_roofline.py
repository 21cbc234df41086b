from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.latency.accelerators import (
    EAGER_LAYER,
    HARDWARE,
    KINDS,
    VECTOR_LAYER,
    Hardware,
    UnknownHardwareError,
)
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.latency.roofline import LINK_SHARE, MODEL_SHAPES, ModelShape, pass_seconds, roofline
from specgym.decoding.rounds import Round

A100 = HARDWARE["a100-80gb-sxm"]
TARGET, DRAFT = MODEL_SHAPES["opt-6.7b"], MODEL_SHAPES["opt-125m"]
RTX, QUANTISED = HARDWARE["rtx-3090"], MODEL_SHAPES["llama-3.1-8b"].quantised(4)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# A pass reads 1,000 bytes of weights and 10 a token of context, and does 200 operations and 32 a token of context.
SMALL = ModelShape(
    "small", parameters=100, bytes_per_parameter=10, layers=2, hidden_size=4, key_value_bytes_per_token=10
)
SIMPLE = Hardware("simple", memory_bandwidth=100.0, peak_arithmetic=1000.0, pass_overhead=3.0, source="made up")

shapes = st.builds(
    ModelShape,
    name=st.just("any"),
    parameters=st.integers(10**6, 10**11),
    bytes_per_parameter=st.sampled_from([0.5, 1, 2, 4]),
    layers=st.integers(1, 100),
    hidden_size=st.integers(64, 16384),
    key_value_bytes_per_token=st.integers(100, 10**6),
)
named_hardware = st.sampled_from(list(HARDWARE))


def best_draft_length(profile: LatencyProfile, acceptance: float = 0.8) -> int:
    """Draft length of the most tokens a second, where all drafted tokens are equally likely to be accepted."""
    seconds = profile.round_seconds(16)
    tokens = (1 - acceptance ** np.arange(1, 18)) / (1 - acceptance)
    return int((tokens / seconds).argmax())


def exact(**changes: Any) -> dict[str, Any]:
    return {"batch_size": 2, "context": 50, "bandwidth_share": 1.0, "arithmetic_share": 1.0, **changes}


def test_a_pass_takes_the_longer_of_reading_and_computing_and_the_overheads() -> None:
    assert pass_seconds(SMALL, SIMPLE, 1, **exact()) == pytest.approx(3 + (1000 + 2 * 50 * 10) / 100)
    operations = (2 * 100 + 4 * 2 * 4 * 50) * 2 * 30
    assert pass_seconds(SMALL, SIMPLE, 30, **exact()) == pytest.approx(3 + operations / 1000)
    layered = replace(SIMPLE, layer_overhead=0.5)
    assert pass_seconds(SMALL, layered, 1, **exact()) == pytest.approx(3 + 2 * 0.5 + 20)


def test_shares_of_the_peaks_lengthen_a_pass_where_they_bind() -> None:
    assert pass_seconds(SMALL, SIMPLE, 1, **exact(bandwidth_share=0.5)) == pytest.approx(3 + 40)
    assert pass_seconds(SMALL, SIMPLE, 1, **exact(arithmetic_share=0.5)) == pytest.approx(3 + 20)


@given(shapes, named_hardware, st.integers(1, 32), st.integers(1, 256), st.integers(1, 10**5))
def test_more_work_never_takes_less_time(
    shape: ModelShape, hardware: str, tokens: int, batch_size: int, context: int
) -> None:
    seconds = pass_seconds(shape, hardware, tokens, batch_size=batch_size, context=context)
    assert seconds > 0
    assert pass_seconds(shape, hardware, tokens + 1, batch_size=batch_size, context=context) >= seconds
    assert pass_seconds(shape, hardware, tokens, batch_size=batch_size + 1, context=context) >= seconds
    assert pass_seconds(shape, hardware, tokens, batch_size=batch_size, context=context + 1) >= seconds
    together = pass_seconds(shape, hardware, tokens, batch_size=2 * batch_size, context=context)
    assert together <= 2 * seconds * (1 + 1e-9)  # one batch is never dearer than two


@given(shapes, named_hardware, st.sampled_from(BATCH_SIZES), st.integers(0, 16))
def test_a_draft_costs_a_pass_a_token_and_a_round_one_pass_more(
    draft: ModelShape, hardware: str, batch_size: int, drafted: int
) -> None:
    point = roofline(TARGET, draft, hardware, batch_sizes=[batch_size], contexts=[100])
    where: dict[str, Any] = {"batch_size": batch_size, "context": 100}
    expected = drafted * pass_seconds(draft, hardware, 1, **where) + pass_seconds(
        TARGET, hardware, drafted + 1, **where
    )
    assert point.round(drafted) == pytest.approx(expected)
    assert point.round(0) == point.autoregressive_seconds


def test_at_batch_size_1_a_gpu_verifies_eight_tokens_at_the_price_of_one() -> None:
    profile = roofline(TARGET, DRAFT, A100)
    assert profile.at(context=512).target(8) == pytest.approx(profile.at(context=512).target(1), rel=0.05)
    large = profile.at(batch_size=128, context=512)
    assert large.target(8) > 2 * large.target(1)


@pytest.mark.parametrize("draft", [DRAFT, None], ids=["model", "free"])
def test_the_best_draft_length_falls_as_the_batch_grows(draft: ModelShape | None) -> None:
    profile = roofline(TARGET, draft, A100, contexts=(512,))
    best = [best_draft_length(profile.at(batch_size=size)) for size in BATCH_SIZES]
    assert best[-1] < best[0]
    assert best == sorted(best, reverse=True)
    costs = [profile.at(batch_size=size).marginal_cost() for size in (1, 16, 32, 64, 128)]
    assert costs == sorted(costs)


def test_a_long_context_keeps_large_batches_bound_by_memory() -> None:
    profile = roofline(TARGET, DRAFT, A100)
    assert best_draft_length(profile.at(batch_size=128, context=8192)) > best_draft_length(
        profile.at(batch_size=128, context=512)
    )


def test_published_rates_of_plain_decoding_are_met() -> None:
    # gpt-fast, README: an A100 writes 93.89 tokens/s with Llama-3.1-8B in bfloat16 after a prompt of 5 tokens.
    profile = roofline(MODEL_SHAPES["llama-3.1-8b"], None, A100, batch_sizes=[1], contexts=[5])
    assert 1 / profile.autoregressive_seconds == pytest.approx(93.89, rel=0.05)


def test_a_draft_that_is_no_model_costs_nothing() -> None:
    profile = roofline(TARGET, None, "l4")
    assert profile.draft(16) == 0
    assert profile.pair == "opt-6.7b+free"


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_lookahead_round_is_one_pass_over_all_that_it_reads(batch_size: int) -> None:
    profile = roofline(TARGET, None, A100, decoder="lookahead", batch_sizes=(1, 8), contexts=(512,))
    point = profile.at(batch_size=batch_size)
    assert (point.kind, point.pair, point.draft_seconds) == ("lookahead", "opt-6.7b", {0: 0.0})
    assert list(point.target_seconds) == list(range(1, 161))
    for tokens in (1, 20, 120):
        read = Round((1,), 5, 0, 0.0, 0.0, 0.0, draft_steps=0, target_tokens=tokens)
        expected = pass_seconds(TARGET, A100, tokens, batch_size=batch_size, context=512)
        assert point.charge([read]) == pytest.approx(expected)
    longer = roofline(TARGET, None, A100, decoder="lookahead", max_target_tokens=300)
    assert max(longer.target_seconds) == 300


def test_the_profile_covers_every_batch_size_with_every_context(tmp_path: Path) -> None:
    profile = roofline(TARGET, DRAFT, "h100-sxm", batch_sizes=(8, 1, 8), contexts=(300, 20), max_draft_length=5)
    assert (profile.batch_size, profile.context, profile.pair) == (1, 20, "opt-6.7b+opt-125m")
    result = {(point.batch_size, point.context) for point in (profile, *profile.points)}
    assert result == {(1, 20), (1, 300), (8, 20), (8, 300)}
    assert list(profile.draft_seconds) == list(range(6))
    assert list(profile.target_seconds) == list(range(1, 7))
    assert profile.hardware["name"] == "h100-sxm"
    assert profile.hardware["source"] == HARDWARE["h100-sxm"].source
    assert profile.at(batch_size=4, context=100).autoregressive_seconds > profile.autoregressive_seconds
    with pytest.raises(LatencyProfileError, match="batch sizes 1 to 8 and contexts 20 to 300"):
        profile.at(batch_size=16)
    profile.save(tmp_path / "profile.json")
    assert LatencyProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_draft_length": 0}, "max_draft_length must be a whole number of at least 1, got 0"),
        ({"batch_sizes": (4, 0)}, "each of batch_sizes must be a whole number of at least 1, got 0"),
        ({"contexts": ()}, "contexts must have at least 1 value"),
        ({"decoder": "lookahead"}, "lookahead rounds have no draft, and opt-125m was given"),
        ({"decoder": "lookahead", "max_draft_length": 4}, "max_draft_length is not for lookahead rounds"),
        ({"max_target_tokens": 4}, "max_target_tokens is not for chain rounds"),
        ({"bandwidth_share": 0.0}, "bandwidth_share must be a number above 0 and at most 1, got 0.0"),
        ({"arithmetic_share": 1.5}, "arithmetic_share must be a number above 0 and at most 1, got 1.5"),
        ({"devices": 0}, "devices must be a whole number of at least 1, got 0"),
        ({"devices": 8, "draft_devices": 2}, "draft_devices must be one of 1, 8, got 2"),
        ({"devices": 2, "hardware": "m2-ultra-gpu"}, "m2-ultra-gpu has no link to spread a model over 2 devices"),
        ({"software": "fast"}, "software must be one of 'compiled', 'eager', 'llama.cpp', got 'fast'"),
        ({"software": "eager", "hardware": "m3-max-gpu"}, "m3-max-gpu is of kind 'apple'; give 'compiled'"),
        ({"software": "llama.cpp", "hardware": "epyc-9654"}, "epyc-9654 is of kind 'cpu'; give 'compiled'"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roofline(TARGET, DRAFT, **{"hardware": A100, **arguments})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "no known hardware. Did you mean 'a100-80gb-sxm'[?]"),
        ("h10-sxm", "no known hardware. Did you mean .*'h100-sxm'"),
        ("abacus", "Give one of a100-80gb-sxm, h100-sxm"),
    ],
)
def test_unknown_hardware_is_refused_with_the_names_that_are_known(name: str, message: str) -> None:
    with pytest.raises(UnknownHardwareError, match=message):
        roofline(TARGET, DRAFT, name)


@pytest.mark.parametrize("field", [field.name for field in fields(Hardware) if str(field.type).startswith("float")])
def test_hardware_that_makes_no_sense_is_refused(field: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{field} of simple must be finite"):
            replace(SIMPLE, **dict[str, Any]({field: value}))
    with pytest.raises(ValueError, match="kind of simple must be one of 'server-gpu'"):
        replace(SIMPLE, kind="gpu")


def test_every_named_figure_says_where_it_is_from() -> None:
    assert {hardware.kind for hardware in HARDWARE.values()} == set(KINDS)
    for hardware in HARDWARE.values():
        assert len(hardware.source) > 40
        assert 10 < hardware.peak_arithmetic / hardware.memory_bandwidth < 1000  # operations a byte
        assert hardware.memory is not None
        assert 0.01 < hardware.memory / hardware.memory_bandwidth < 3  # seconds to read all of it
        if hardware.link_bandwidth is not None:
            assert hardware.link_bandwidth < hardware.memory_bandwidth
            assert 0 < hardware.link_latency < 1e-4


def test_devices_divide_bytes_and_arithmetic_and_reduce_twice_a_layer() -> None:
    linked = replace(SIMPLE, link_bandwidth=40.0, link_latency=0.25)
    shared: dict[str, Any] = {"devices": 4, "context": 50, "bandwidth_share": 1.0, "arithmetic_share": 1.0}
    sent = 2 * 3 / 4 * 2 * 4 * 2  # of a ring of four: two bytes of width 4, for two sequences
    reductions = 2 * 2 * (0.25 + sent / (40 * LINK_SHARE))
    divided = (1000 + 2 * 50 * 10) / 4 / 100
    assert pass_seconds(SMALL, linked, 1, batch_size=2, **shared) == pytest.approx(3 + divided + reductions)
    two_heads = replace(SMALL, key_value_heads=2)  # which four devices cannot divide further
    divided = (1000 / 4 + 2 * 50 * 10 / 2) / 100
    assert pass_seconds(two_heads, linked, 1, batch_size=2, **shared) == pytest.approx(3 + divided + reductions)
    wider = replace(SMALL, width=8)
    longer = 2 * 2 * sent / (40 * LINK_SHARE)
    assert pass_seconds(wider, linked, 1, batch_size=2, **shared) == pytest.approx(
        pass_seconds(SMALL, linked, 1, batch_size=2, **shared) + longer
    )
    operations = (2 * 100 + 4 * 2 * 4 * 50) * 2 * 300 / 4
    assert pass_seconds(SMALL, linked, 300, batch_size=2, **shared) == pytest.approx(
        3 + operations / 1000 + 2 * 2 * (0.25 + 300 * sent / (40 * LINK_SHARE))
    )


def test_a_roofline_spreads_the_target_and_leaves_the_draft_on_one_device() -> None:
    where: dict[str, Any] = {"batch_sizes": [8], "contexts": [100]}
    single, eight = (roofline(TARGET, DRAFT, A100, devices=devices, **where) for devices in (1, 8))
    assert eight.draft(1) == single.draft(1)
    assert single.target(1) / 8 < eight.target(1) < single.target(1)
    everywhere = roofline(TARGET, DRAFT, A100, devices=8, draft_devices=8, **where)
    assert everywhere.draft(1) == pytest.approx(pass_seconds(DRAFT, A100, 1, batch_size=8, context=100, devices=8))
    assert everywhere.hardware["devices"] == 8


def test_eager_passes_wait_for_the_host_and_hide_what_the_device_does() -> None:
    passes = {tokens: pass_seconds(TARGET, A100, tokens, software="eager") for tokens in (1, 8)}
    assert passes[1] == passes[8] == TARGET.layers * EAGER_LAYER > 3 * pass_seconds(TARGET, A100, 8)
    large: dict[str, Any] = {"batch_size": 256, "context": 1000}
    assert pass_seconds(TARGET, A100, 8, software="eager", **large) == pass_seconds(TARGET, A100, 8, **large)


def test_llama_cpp_verifies_few_tokens_of_quantised_models_one_after_the_other() -> None:
    few = [pass_seconds(QUANTISED, RTX, tokens, software="llama.cpp") for tokens in (1, 2, 3, 8, 9)]
    token = (few[3] - few[0]) / 7
    assert few[1] - few[0] == pytest.approx(token)
    assert few[2] - few[0] == pytest.approx(2 * token)
    assert token == pytest.approx(1.05e-3, rel=0.05)  # as published for Q4_0 on this card
    assert few[4] == few[3]  # larger batches are products of matrices
    sooner = QUANTISED.layers * (RTX.layer_overhead - VECTOR_LAYER)
    assert pass_seconds(QUANTISED, RTX, 512, software="llama.cpp") == pytest.approx(
        pass_seconds(QUANTISED, RTX, 512) - sooner
    )
    whole = MODEL_SHAPES["llama-3.1-8b"]
    assert pass_seconds(whole, RTX, 8, software="llama.cpp") == pass_seconds(whole, RTX, 8)


@given(shapes, st.sampled_from(["compiled", "eager", "llama.cpp"]), st.integers(1, 32), st.integers(1, 256))
def test_more_work_never_takes_less_time_whatever_the_software(
    shape: ModelShape, software: str, tokens: int, batch_size: int
) -> None:
    few, more, larger = (
        pass_seconds(shape, RTX, read, batch_size=size, software=software)
        for read, size in ((tokens, batch_size), (tokens + 1, batch_size), (tokens, batch_size + 1))
    )
    assert few <= min(more, larger)


@pytest.mark.parametrize(("bits", "speed"), [(8, 0.81), (4, 0.65)])
def test_weights_that_a_gpu_has_to_widen_are_read_more_slowly(bits: int, speed: float) -> None:
    where: dict[str, Any] = {"context": 1, "bandwidth_share": 1.0}
    whole = replace(MODEL_SHAPES["llama-3.1-8b"], key_value_bytes_per_token=1)
    reading = {
        (name, software): pass_seconds(shape, hardware, 1, software=software, **where) - overhead
        for name, shape in (("whole", whole), ("quantised", whole.quantised(bits)))
        for hardware, software in ((A100, "compiled"), (A100, "llama.cpp"))
        for less in [software == "llama.cpp" and name == "quantised"]
        for overhead in [whole.layers * (VECTOR_LAYER if less else hardware.layer_overhead)]
    }
    smaller = (bits + 16 / 32) / 16
    assert reading["quantised", "llama.cpp"] / reading["whole", "llama.cpp"] == pytest.approx(smaller)
    assert reading["quantised", "compiled"] / reading["whole", "compiled"] == pytest.approx(smaller / speed)
    cpu = HARDWARE["epyc-9654"]
    on_cpu = [pass_seconds(shape, cpu, 1, **where) for shape in (whole, whole.quantised(bits))]
    overhead = cpu.pass_overhead + whole.layers * cpu.layer_overhead
    assert (on_cpu[1] - overhead) / (on_cpu[0] - overhead) == pytest.approx(smaller)


def test_layers_with_a_window_read_no_more_than_it() -> None:
    windowed = replace(SMALL, windowed_layers=1, window=10)
    assert pass_seconds(windowed, SIMPLE, 1, **exact()) == pytest.approx(3 + (1000 + 2 * (50 + 10) / 2 * 10) / 100)
    assert pass_seconds(windowed, SIMPLE, 1, **exact(context=9)) == pass_seconds(SMALL, SIMPLE, 1, **exact(context=9))
