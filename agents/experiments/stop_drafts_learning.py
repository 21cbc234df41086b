"""Training one policy by replay, while the price of time follows the throughput that it reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule

from specgym.decoding import LatencyProfile, replacing
from specgym.envs import DraftLengthVectorEnv, Trace

from ..export.stop_rule import ExportedStopRule
from ..training.sb3_vec_env import VectorEnvAdaptor
from ..training.stop_run import StoppingRun
from .stop_drafts import StoppingSettings
from .stop_drafts_policy import RoundEpisodes, StoppingPolicy


class RateCallback(BaseCallback):
    """After every rollout, prices time at the throughput reached: one half of Dinkelbach's algorithm.

    For every operating point (``<workload>``, followed by `` x <batch size>`` where there are several) it logs

    ==========================================  ================================================================
    tag                                         meaning, over the rollout
    ==========================================  ================================================================
    ``throughput/<point>``                      tokens over seconds, relative to plain decoding
    ``rate/<point>``                            what time is priced at from now on
    ``draft_length/<point>``                    drafted tokens a round
    ``draft_acceptance_rate/<point>``           accepted over drafted tokens
    ==========================================  ================================================================

    Args:
        env: that is trained on.
        smoothing: how far a rate moves to the throughput, above 0, at most 1.
    """

    def __init__(self, env: DraftLengthVectorEnv, smoothing: float) -> None:
        super().__init__()
        self._env = env
        self._smoothing = smoothing
        self._known = np.zeros(len(env.points), np.bool_)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        totals, rates = self._env.totals(), self._env.rates
        reached = totals.throughput
        seen = totals.seconds > 0
        # The first throughput is far from the 1 that the rates begin with, so it is taken as it is.
        share = np.where(self._known, self._smoothing, 1.0)
        rates = np.where(seen, rates + share * (reached - rates), rates)
        self._known |= seen
        self._env.set_rates(rates)
        several = len({point.batch_size for point in self._env.points}) > 1
        for number, point in enumerate(self._env.points):
            name = f"{point.workload} x {point.batch_size}" if several else point.workload
            self.logger.record(f"throughput/{name}", float(reached[number]))
            self.logger.record(f"rate/{name}", float(rates[number]))
            self.logger.record(f"draft_length/{name}", float(totals.drafted[number] / max(totals.rounds[number], 1)))
            accepted = float(totals.accepted[number] / max(totals.drafted[number], 1))
            self.logger.record(f"draft_acceptance_rate/{name}", accepted)


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
        trace=traces,
        profile=profiles,
        max_draft_length=settings.max_draft_length,
        tokens=settings.tokens,
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
                callback=RateCallback(env, learning.rate_smoothing),
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
