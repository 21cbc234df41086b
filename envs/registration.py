"""Registration of decoders, and of the environments that tune and control them."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

import gymnasium

from specgym.decoding import environment_names
from specgym.decoding import register as register_decoder

if TYPE_CHECKING:
    from specgym.decoding import Decoder


def register(decoder: type[Decoder[Any]] | str, traits: str | None = None) -> str:
    """Make a decoder known: its name to recording, training and the command line, and its environment to Gymnasium.

    Arguments and errors as for `specgym.decoding.register`. The environment's id is `environment_id` of its name.

    Returns:
        The decoder's name.
    """
    register_decoder(decoder, traits)
    register_environments()
    kind: Any = pkgutil.resolve_name(traits or decoder) if isinstance(decoder, str) else decoder
    return str(kind.name)


def register_environments() -> None:
    """Add the environments of all registered decoders to Gymnasium's registry; those already there are left alone."""
    for decoder in environment_names():
        if environment_id(decoder) not in gymnasium.registry:
            gymnasium.register(
                id=environment_id(decoder),
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
    if "specgym/DraftChoice-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/DraftChoice-v0",
            entry_point="specgym.envs.control.choice_env:DraftChoiceEnv",
            vector_entry_point="specgym.envs.control.choice_vector_env:DraftChoiceVectorEnv",
        )
    if "specgym/RoundKnobs-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/RoundKnobs-v0",
            entry_point="specgym.envs.control.round_env:RoundKnobsEnv",
            vector_entry_point="specgym.envs.control.round_env:RoundKnobsVectorEnv",
        )
    if "specgym/Engine-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/Engine-v0",
            entry_point="specgym.envs.tuning.engine_env:EngineEnv",
            vector_entry_point="specgym.envs.tuning.engine_env:EngineVectorEnv",
            max_episode_steps=20,
            nondeterministic=True,
        )
    if "specgym/SpeculativeWorlds-v0" not in gymnasium.registry:
        gymnasium.register(
            id="specgym/SpeculativeWorlds-v0",
            entry_point="specgym.envs.worlds.env:WorldsEnv",
            vector_entry_point="specgym.envs.worlds.env:WorldsVectorEnv",
        )


def environment_id(decoder: str) -> str:
    """Return the id of a registered decoder's environment, `specgym/Thresholds-v0` for `threshold`."""
    return f"specgym/{environment_names()[decoder]}-v0"
