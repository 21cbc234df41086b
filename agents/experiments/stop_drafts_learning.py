"""Training one policy by replay, while the price of time follows the throughput that it reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule

from specgym.callbacks import RateCallback
from specgym.decoding import LatencyProfile, replacing
from specgym.envs import DraftLengthVectorEnv, Trace

from ..export.stop_rule import ExportedStopRule
from ..training.sb3_vec_env import VectorEnvAdaptor
from ..training.stop_run import StoppingRun
from .stop_drafts import StoppingSettings
from .stop_drafts_policy import RoundEpisodes, StoppingPolicy


def learn(
    run: StoppingRun,
    settings: StoppingSettings,
    seed: int,
    traces: Sequence[Trace],
    profiles: Sequence[LatencyProfile],
    progress_bar: bool = True,
) -> ExportedStopRule:
    """Train the policy of one seed, and write it to the run's folder.

    Args:
        run: where to.
        settings: how.
        seed: fixes every random choice.
        traces: of the training prompts of each workload.
        profiles: of each workload.
        progress_bar: show one.
    """
    env = DraftLengthVectorEnv(
        settings.environments,
        workload=settings.workloads,
        recording=traces,
        profile=profiles,
        max_draft_length=settings.max_draft_length,
        max_new_tokens=settings.tokens,
        batch_size=settings.batch_sizes,
        decision_seconds=settings.decision_seconds,
    )
    learning = settings.learning
    with contextlib.closing(RoundEpisodes(VectorEnvAdaptor(env))) as environments:
        model = PPO(
            StoppingPolicy,
            environments,
            n_steps=learning.rollout_steps,
            batch_size=min(learning.batch_size, learning.rollout_steps * settings.environments),
            n_epochs=learning.epochs,
            learning_rate=LinearSchedule(learning.learning_rate, 0.0, 1.0),
            gamma=learning.gamma,
            gae_lambda=learning.gae_lambda,
            clip_range=learning.clip_range,
            ent_coef=learning.entropy_coefficient,
            policy_kwargs={"net_arch": {"pi": list(learning.policy_layers), "vf": list(learning.value_layers)}},
            seed=seed,
            device="cpu",  # networks this small are slower anywhere else
        )
        logger = configure(str(run.tensorboard(seed)), ["tensorboard"])
        model.set_logger(logger)
        try:
            model.learn(
                settings.total_timesteps,
                callback=RateCallback(learning.rate_smoothing),
                progress_bar=progress_bar,
            )
            logger.dump(model.num_timesteps)  # what the last update recorded
        finally:
            logger.close()
    assert isinstance(model.policy, StoppingPolicy)
    rule = ExportedStopRule.of(model.policy)
    save_policy(run, seed, model, rule)
    return rule


def save_policy(run: StoppingRun, seed: int, model: PPO, rule: ExportedStopRule) -> None:
    """Write a policy in both forms, each file whole or not at all."""
    with replacing(run.policy(seed)) as temporary, temporary.open("wb") as file:
        model.save(file)
    rule.save(run.policy_folder(seed))
