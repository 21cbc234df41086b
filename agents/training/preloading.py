"""Loads model pairs in the process that others are forked from, so that those share the memory of the weights.

Importing this module is what loads them. It is for the fork server of `multiprocessing` alone, which imports it before
it forks; `specgym.agents.training.environments` tells it to. A process that was not forked from there loads its own
pair.
"""

from __future__ import annotations

import gc
import json
import os

import torch

from specgym.envs import workload

from .environments import PRELOADED


def _load_pairs() -> tuple[str, ...]:
    """Load the pairs of the workloads that the environment variable names; those that could be loaded."""
    torch.set_num_threads(1)  # a forked process has no threads but its own, and would wait for those of a pool for ever
    loaded = []
    for name in json.loads(os.environ.get(PRELOADED, "[]")):
        try:
            workload(name).load()
        except Exception:  # it would end the fork server, and whoever needs the pair will say what is wrong
            continue
        loaded.append(name)
    gc.collect()
    gc.freeze()  # or the collector would write to the pages of every object, and copy them
    return tuple(loaded)


LOADED = _load_pairs()
"""The workloads whose pairs were loaded here."""
