"""A small sampler of worlds, made once."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.decoding import sensible_deployments
from specgym.envs.worlds.pool import AcceptancePool
from specgym.envs.worlds.worlds import Charges, WorldSampler

NAMES = ("tiny-3m-1l/definitions", "tiny/prose@1.0")


@pytest.fixture(scope="session")
def charges() -> Charges:
    """Costs on laptops, desktops and servers, of a few of their models."""
    return Charges.of(sensible_deployments(hardware=["rtx-4090", "h100-sxm", "m1-max-cpu"], contexts=[512])[::7])


@pytest.fixture(scope="session")
def sampler(charges: Charges) -> WorldSampler:
    """Six warped acceptance worlds on all of them."""
    pool = AcceptancePool.warped(NAMES, 6)
    return WorldSampler(pool, charges, np.ones(len(charges.labels), np.bool_))
