"""Registration of the package's environments with Gymnasium."""

from __future__ import annotations

import gymnasium

from specgym.decoding import environment_names


def register_environments() -> None:
    """Add the environments of this package to Gymnasium's registry; those already there are left alone."""
    for decoder, name in environment_names().items():
        if f"specgym/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"specgym/{name}-v0",
                entry_point="specgym.envs.tuning.env:TuningEnv",
                vector_entry_point="specgym.envs.tuning.vector_env:TuningVectorEnv",
                max_episode_steps=20,
                kwargs={"decoder": decoder},
            )
    if "specgym/DraftLength-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/DraftLength-v0",
            entry_point="specgym.envs.control.env:DraftLengthEnv",
            vector_entry_point="specgym.envs.control.vector_env:DraftLengthVectorEnv",
        )
