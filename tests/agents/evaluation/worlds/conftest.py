"""A few worlds of recorded workloads on a few deployments."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.agents.evaluation.worlds.methods import Universal
from specgym.agents.evaluation.worlds.sessions import Problem
from specgym.decoding import HARDWARE, MODEL_SHAPES, Deployment
from specgym.envs import AcceptancePool, Charges, WorldSampler


@pytest.fixture(scope="package")
def sampler() -> WorldSampler:
    """Three recorded workloads, a server on which speculating pays and desktops on which it hardly does."""
    deployments = [
        Deployment(MODEL_SHAPES["llama-3.1-70b"], MODEL_SHAPES["llama-3.2-1b"], HARDWARE["h100-sxm"], devices=4),
        *(
            Deployment(MODEL_SHAPES["qwen3-8b"], MODEL_SHAPES["qwen3-0.6b"], HARDWARE["rtx-4090"], software=software)
            for software in ("eager", "llama.cpp")
        ),
    ]
    pool = AcceptancePool.recorded(["tiny/prose", "tiny-10m-xs/code", "tiny-3m-ngram/chat"])
    return WorldSampler(pool, Charges.of(deployments), np.ones(len(deployments), np.bool_))


@pytest.fixture(scope="package")
def problem(sampler: WorldSampler) -> Problem:
    """Forty worlds."""
    return Problem.drawn(sampler, 40, (0, 0))


@pytest.fixture(scope="package")
def universal(sampler: WorldSampler) -> Universal:
    """Single settings that are best over other worlds."""
    return Universal.of(Problem.drawn(sampler, 200, (1, 0)))
