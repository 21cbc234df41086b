from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specgym.decoding.latency.accelerators import HARDWARE, KINDS
from specgym.decoding.latency.deployments import MEMORY_SHARE, Deployment, round_costs, sensible_deployments
from specgym.decoding.latency.model_shapes import MODEL_SHAPES
from specgym.decoding.latency.roofline import roofline

LLAMA, SMALL = MODEL_SHAPES["llama-3.1-70b"], MODEL_SHAPES["llama-3.2-1b"]
H100 = HARDWARE["h100-sxm"]
SIZES = (1, 3, 64, 256)

DEPLOYMENTS = [
    Deployment(LLAMA, SMALL, H100, devices=4, context=700),
    Deployment(LLAMA, SMALL, H100, devices=2, target_bits=4, draft_bits=8, draft_devices=2),
    Deployment(
        MODEL_SHAPES["gemma-3-12b"], None, HARDWARE["m2-ultra-gpu"], target_bits=8, context=3000, software="llama.cpp"
    ),
    Deployment(MODEL_SHAPES["qwen3-8b"], MODEL_SHAPES["qwen3-0.6b"], HARDWARE["rtx-4090"], software="eager"),
]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment.label)
def test_the_costs_of_rounds_are_those_of_the_roofline(deployment: Deployment) -> None:
    plain, step, target = round_costs(deployment, SIZES, 9)
    profile = roofline(
        deployment.stored_target,
        deployment.stored_draft,
        deployment.hardware,
        max_draft_length=9,
        batch_sizes=SIZES,
        contexts=[deployment.context],
        devices=deployment.devices,
        draft_devices=deployment.draft_devices,
        software=deployment.software,
    )
    assert (plain.shape, step.shape, target.shape) == ((4,), (4,), (4, 10))
    for row, size in enumerate(SIZES):
        point = profile.at(batch_size=size, context=deployment.context)
        assert plain[row] == pytest.approx(point.autoregressive_seconds)
        rounds = step[row] * np.arange(10) + target[row]
        np.testing.assert_allclose(rounds, point.round_seconds(9))


def test_memory_is_that_of_the_fullest_device() -> None:
    deployment = Deployment(LLAMA, SMALL, H100, devices=4, target_bits=4, draft_bits=4, context=1000)
    weights = LLAMA.stored_parameters * 4.125 / 8 / 4 + SMALL.stored_parameters * 4.125 / 8
    cached = 1000 * (LLAMA.key_value_bytes_per_token / 4 + SMALL.key_value_bytes_per_token)
    assert deployment.memory() == pytest.approx(weights + cached)
    assert deployment.memory(100) == pytest.approx(weights + 100 * cached)
    shared = replace(LLAMA, key_value_heads=2)  # of which four devices hold copies
    assert replace(deployment, target=shared).memory() == pytest.approx(
        weights + cached + 1000 * LLAMA.key_value_bytes_per_token / 4
    )


def test_a_batch_fits_up_to_the_share_of_the_memory() -> None:
    assert not Deployment(LLAMA, None, H100).fits()
    deployment = Deployment(LLAMA, SMALL, H100, devices=4, context=8192)
    most = int((MEMORY_SHARE * 80e9 - deployment.memory(1)) / (deployment.memory(2) - deployment.memory(1))) + 1
    assert deployment.fits(most)
    assert not deployment.fits(most + 1)
    with pytest.raises(ValueError, match="memory of h100-sxm is not known; give Hardware"):
        replace(deployment, hardware=replace(H100, memory=None)).fits()


def test_labels_say_what_runs_where() -> None:
    assert DEPLOYMENTS[1].label == "llama-3.1-70b-q4+llama-3.2-1b-q8 on 2xh100-sxm at 2048"
    assert DEPLOYMENTS[2].label == "gemma-3-12b-q8+free on 1xm2-ultra-gpu llama.cpp at 3000"
    assert DEPLOYMENTS[3].label == "qwen3-8b+qwen3-0.6b on 1xrtx-4090 eager at 2048"
    assert [deployment.hardware_class for deployment in DEPLOYMENTS] == [
        "server-gpu",
        "server-gpu",
        "apple",
        "consumer-gpu",
    ]


def test_sensible_deployments_fit_and_draft_with_something_much_smaller() -> None:
    deployments = sensible_deployments(contexts=[512])
    assert len({deployment.label for deployment in deployments}) == len(deployments) > 1000
    assert {deployment.hardware_class for deployment in deployments} == set(KINDS)
    assert {deployment.target_bits for deployment in deployments} == {16, 8, 4}
    assert {deployment.software for deployment in deployments} == {"compiled", "eager", "llama.cpp"}
    assert len({deployment.target.name for deployment in deployments}) >= 12
    assert len({deployment.draft.name for deployment in deployments if deployment.draft}) >= 8
    for deployment in deployments:
        assert deployment.fits()
        assert deployment.draft is not None
        assert 3 * deployment.draft.stored_parameters < deployment.target.stored_parameters
    largest = [deployment for deployment in deployments if deployment.target.name == "llama-3.1-405b"]
    assert {deployment.devices for deployment in largest if deployment.target_bits == 16} == {8}


def test_sensible_deployments_are_chosen_from_what_is_asked_for() -> None:
    chosen = sensible_deployments(targets=[LLAMA], drafts=[SMALL], hardware=["h100-sxm"], contexts=[2048, 100_000])
    assert {(deployment.devices, deployment.target_bits, deployment.context) for deployment in chosen} >= {
        (4, 16, 2048),
        (8, 16, 2048),
        (2, 8, 2048),
        (1, 4, 2048),
        (8, 4, 100_000),
    }
    assert not sensible_deployments(targets=[SMALL], drafts=[LLAMA])
    assert not sensible_deployments(targets=[MODEL_SHAPES["opt-30b"]], contexts=[4096])  # which reads 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_bits": 5}, "target_bits must be one of 16, 8, 4, got 5"),
        ({"context": 0}, "context must be a whole number of at least 1, got 0"),
        ({"context": 200_000}, "context must be at most 131072, as far as llama-3.1-70b reads, got 200000"),
        ({"draft_devices": 3}, "draft_devices must be one of 1, 4, got 3"),
        ({"hardware": HARDWARE["epyc-9654"]}, "epyc-9654 has no link to spread a model over 4 devices"),
        ({"software": "fast"}, "software must be one of 'compiled', 'eager', 'llama.cpp', got 'fast'"),
    ],
)
def test_deployments_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DEPLOYMENTS[0], **changes)


def test_costs_of_no_sequence_or_no_draft_are_refused() -> None:
    with pytest.raises(ValueError, match="each of batch_sizes must be a whole number of at least 1, got 0"):
        round_costs(DEPLOYMENTS[0], [1, 0], 4)
    with pytest.raises(ValueError, match="longest must be a whole number of at least 1, got 0"):
        round_costs(DEPLOYMENTS[0], [1], 0)
