"""Import paths of earlier versions, kept for saved models and for what documentation promised.

Pickles inside Stable-Baselines3 zips name classes by the module that they stood in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "specgym.agents.experiments.stop_policy": "specgym.agents.experiments.control.stop_policy",
    "specgym.agents.numerics": "specgym.agents.training.sb3_vec_env",
    "specgym.agents.stopping": "specgym.agents",
    "specgym.agents.stopping.export": "specgym.agents.export.stop_rule",
    "specgym.agents.stopping.policy": "specgym.agents.experiments.control.stop_policy",
    "specgym.agents.vec_adaptor": "specgym.agents.training.sb3_vec_env",
    "specgym.callbacks.prioritised_replay": "specgym.callbacks.replay.prioritised",
    "specgym.decoding.latency_measure": "specgym.decoding.latency.measure",
    "specgym.decoding.lookahead": "specgym.decoding",
    "specgym.decoding.roofline": "specgym.decoding.latency.roofline",
    "specgym.decoding.stopping": "specgym.decoding.decoders.stop_rules",
    "specgym.envs.traces": "specgym.envs.recordings.trace",
    "specgym.envs.vector_draft_length": "specgym.envs.control.vector_env",
    "specgym.envs.vector_tuning": "specgym.envs.tuning.vector_env",
}
"""Modules by their earlier names."""


class _MovedModule(ModuleType):
    """Stand-in under an earlier name, whose attributes are those of the module at its present place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(MOVED[self.__name__]), name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call what has the module's own name: importing `specgym.decoding.roofline` hides the function behind it."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Finder:
    """Import finder (`sys.meta_path`) for the names in `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an earlier name; None for any other."""
        if fullname not in MOVED:
            return None
        package = any(name.startswith(f"{fullname}.") for name in MOVED)
        return ModuleSpec(fullname, self, is_package=package)  # type: ignore[arg-type]  # typeshed wants a Loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create the stand-in."""
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: attributes are looked up when they are asked for."""


def install() -> None:
    """Let earlier import paths work. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
