"""Prioritised replay for PPO: past rollouts, re-evaluated under today's policy, drawn by how much they can teach.

Old transitions with their old advantages would pull the policy back to where it was. Instead, after every update of
PPO's own, a phase of replay *recentres*: the segments drawn are evaluated anew, V-trace (1802.01561) gives targets and
advantages under the policy of that moment, PPO's surrogate is clipped around that policy and not around the one that
acted (PPO-EWMA 2110.00641, IMPACT 1912.00167), and what has drifted too far is dropped (GePPO 2111.00072). Segments are
drawn by their advantages, as in PTR-PPO (2112.03798), with the corrections of prioritised replay (1511.05952).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from specgym.decoding import ArgumentError, check_digest, read_arrays, seed_number, write_arrays

from ..checkpoints import CheckpointError
from .phase import ReplayPhase
from .segments import Layout, SegmentStore
from .settings import ReplaySettings

_FORMAT = "specgym-replay-2"
_UNSEALED = "specgym-replay-1"  # has no checksum
_LEAST_ADVANTAGE = 1e-3
"""Added to a mean absolute advantage, so that no segment is out of reach for good."""


class PrioritisedReplayCallback(BaseCallback):
    """Stores every rollout of a PPO, and takes further gradient steps on past ones between two rollouts.

    The steps are taken by the model's own optimiser with its clip ranges, coefficients, norm of the gradient and
    `target_kl`, when the next rollout starts or training ends. A callback that saves the model should come after this
    one in the list. Rewards are stored in the environment's units and normalised again by the statistics of today
    (`VecNormalize`); states cut off by a time limit are valued again, too. Observations are stored as the policy saw
    them. Transitions that the rollout buffer marks in its array `usable` as not to be learned from are left out.

    Logged under ``replay/`` after each phase: ``ratio_mean`` (pi / mu of the steps drawn, both policies before the
    phase), ``clip_fraction`` (0..1), ``effective_sample_size`` (of the weights of a minibatch's steps, as a share of
    them), ``age_mean`` (in rollouts), ``segments`` (that can be drawn), ``dropped`` (so far), ``updates`` (gradient
    steps so far), ``policy_loss``, ``value_loss``, and ``beta``.

    Args:
        settings: settings of replay.
        seed: seed of the draws; at least 0.

    Attributes:
        state_name: name of the saved state.
        updates: gradient steps on replayed minibatches so far.
        dropped: segments dropped so far for their age or their ratio.

    Raises:
        ValueError: the seed is negative, or (when training starts) a rollout has more segments than the capacity, or
            observations are a dictionary.
        TypeError: (when training starts) the model is not a PPO.
    """

    state_name = "prioritised_replay"
    model: PPO

    def __init__(self, settings: ReplaySettings | None = None, seed: int = 0) -> None:
        super().__init__()
        seed_number("seed", seed)
        self.settings = settings or ReplaySettings()
        self.updates = 0
        self.dropped = 0
        self._rng = np.random.default_rng(seed)
        self._store: SegmentStore | None = None
        self._unlearned = False  # a rollout has been stored since the last phase
        self._origin = "what the callback has stored so far"

    def _init_callback(self) -> None:
        if not isinstance(self.model, PPO):
            raise TypeError(f"prioritised replay adds to PPO's updates, and {type(self.model).__name__} is not a PPO")
        buffer = self.model.rollout_buffer
        if isinstance(self.model.observation_space, spaces.Dict):
            raise ArgumentError(
                "prioritised replay stores observations that are one array; flatten the dictionary first"
            )
        if buffer.n_envs > self.settings.capacity:
            raise ArgumentError(
                f"capacity must be at least the number of environments, {buffer.n_envs}, got {self.settings.capacity}"
            )
        observations, actions = buffer.observations, buffer.actions
        layout = Layout(
            self.settings.capacity, buffer.buffer_size,
            tuple(map(int, buffer.obs_shape)), str(observations.dtype),
            (int(buffer.action_dim),), str(actions.dtype),
        )  # fmt: skip
        if self._store is None:
            self._store = SegmentStore(layout)
        else:
            _require_same(self._store.layout, layout, self._origin)

    # Storing

    def _on_rollout_start(self) -> None:
        self._replay()
        self._current = self._stored.layout._replace(capacity=self.model.n_envs).empty()

    def _on_step(self) -> bool:
        # Of what the buffer will hold: rewards before the model adds its value of a truncated state, which will be out
        # of date, and that state, which the buffer never sees.
        step, current = self.model.rollout_buffer.pos, self._current
        normaliser = self.model.get_vec_normalize_env()
        rewards = self.locals["rewards"] if normaliser is None else normaliser.get_original_reward()
        finite = np.isfinite(rewards)
        current.rewards[:, step] = np.where(finite, rewards, 0)
        current.usable[:, step] = finite
        current.ends[:, step] = self.locals["dones"]
        for row in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][row]
            if info.get("TimeLimit.truncated") and info.get("terminal_observation") is not None:
                current.truncated[row, step] = True
                current.after[row, step] = info["terminal_observation"]
        return True

    def _on_rollout_end(self) -> None:
        buffer, current = self.model.rollout_buffer, self._current
        segments = current._replace(
            observations=buffer.observations.swapaxes(0, 1),
            actions=buffer.actions.swapaxes(0, 1),
            log_probs=buffer.log_probs.swapaxes(0, 1),
            usable=current.usable & getattr(buffer, "usable", np.ones_like(buffer.advantages, bool)).T,
        )
        last = ~current.truncated[:, -1]
        segments.after[last, -1] = np.asarray(self.model._last_obs).reshape(current.after[:, -1].shape)[last]
        self._stored.add(segments, self._priorities(buffer.advantages.T, segments.usable))
        self._unlearned = True

    def _on_training_end(self) -> None:
        self._replay()

    def _priorities(self, advantages: np.ndarray, usable: np.ndarray) -> np.ndarray:
        """Return priorities of segments from advantages of shape (segments, steps); 0 without a usable step."""
        if self.settings.priority == "uniform":
            return usable.any(axis=1).astype(float)
        count = usable.sum(axis=1)
        mean = np.where(usable, np.abs(advantages), 0).sum(axis=1, dtype=float) / np.maximum(count, 1)
        return np.where(count > 0, (mean + _LEAST_ADVANTAGE) ** self.settings.alpha, 0)

    # Learning

    def _replay(self) -> None:
        """Run a phase, if there is something new and enough."""
        if not self._unlearned:
            return
        self._unlearned = False
        store, settings, policy = self._stored, self.settings, self.model.policy
        self.dropped += store.remove(store.ages > settings.max_age)
        if not settings.updates or store.rollouts < settings.warm_up:
            return
        done = 1 - self.model._current_progress_remaining
        beta = min(settings.beta_start + (1 - settings.beta_start) * done, 1.0)
        logged: dict[str, list[float]] = {"beta": [beta]}
        phase = ReplayPhase(self.model, store)
        if (drawn := self._draw(phase)) is not None:
            places, probabilities, segments = drawn
            policy.set_training_mode(True)
            for batch, importance in zip(places, importance_weights(probabilities, segments, beta), strict=True):
                stepped, measured = phase.step(batch, importance)
                for name, value in measured.items():
                    logged.setdefault(name, []).append(value)
                if not stepped:
                    break
                self.updates += 1
            policy.set_training_mode(False)
            ratios = np.exp(phase.log_ratios[places][store.data.usable[places]].astype(float))
            logged |= {"ratio_mean": [float(ratios.mean())], "age_mean": [float(store.ages[places].mean())]}
        for name, values in logged.items():
            self.logger.record(f"replay/{name}", float(np.mean(values)))
        for name, count in (("segments", len(store)), ("dropped", self.dropped), ("updates", self.updates)):
            self.logger.record(f"replay/{name}", count)

    def _draw(self, phase: ReplayPhase) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Places for all minibatches of a phase, evaluated; their probabilities; and how many there were to draw from.

        What turns out to be stale is dropped and everything drawn again, until a draw has nothing stale. None if
        nothing is left.
        """
        store, settings = self._stored, self.settings
        while store.tree.total > 0:
            places = store.tree.draw(settings.updates, settings.segments_per_update, self._rng)
            phase.recentre(np.unique(places[~phase.evaluated[places]]))
            dropped = store.remove(phase.drift > math.log(settings.max_ratio))
            self.dropped += dropped
            if not dropped:
                probabilities = store.tree.priorities[places] / store.tree.total
                kept = np.flatnonzero(phase.evaluated & (store.tree.priorities > 0))
                corrections = phase.weights[kept] * phase.advantages[kept]
                store.tree.set(kept, self._priorities(corrections, store.data.usable[kept]))
                return places, probabilities, len(store)
        return None

    @property
    def _stored(self) -> SegmentStore:
        assert self._store is not None, "training has not started"
        return self._store

    # Saving

    def save_state(self, folder: Path) -> None:
        """Write ``prioritised_replay.npz``: segments, priorities, random state and counters.

        Args:
            folder: where; it is created.
        """
        state = {
            "format": _FORMAT,
            "store": self._stored.counters(),
            "updates": self.updates,
            "dropped": self.dropped,
            "unlearned": self._unlearned,
            "dice": self._rng.bit_generator.state,
        }
        arrays = {"state": np.array(json.dumps(state)), **self._stored.arrays()}
        write_arrays(folder / f"{self.state_name}.npz", arrays, compressed=False)

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote, before or after training has started.

        Raises:
            CheckpointError: the file is missing or damaged, or its segments are of another size than this training's.
        """
        path = folder / f"{self.state_name}.npz"
        rng = np.random.default_rng()
        try:
            arrays, sealed = read_arrays(path)
            state: dict[str, Any] = json.loads(str(arrays["state"]))
            if state["format"] not in (_FORMAT, _UNSEALED):
                raise CheckpointError(f"{path} is of another version ({state['format']!r}, not {_FORMAT!r})")
            if state["format"] == _FORMAT and not sealed:
                check_digest(None, "")
            store = SegmentStore.restore(arrays, state["store"])
            rng.bit_generator.state = state["dice"]
            updates, dropped, unlearned = int(state["updates"]), int(state["dropped"]), bool(state["unlearned"])
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged or missing ({error!r})") from error
        here = store.layout if self._store is None else self._store.layout
        _require_same(store.layout, here._replace(capacity=self.settings.capacity), str(path))
        self._store, self._rng, self._origin = store, rng, str(path)
        self.updates, self.dropped, self._unlearned = updates, dropped, unlearned


def importance_weights(probabilities: np.ndarray, segments: int, beta: float) -> np.ndarray:
    """Compute weights (1 / (N p))^beta that undo the preference of a draw, divided by the largest of their minibatch.

    Args:
        probabilities: probabilities of the segments drawn, shape (minibatches, segments in a minibatch).
        segments: number of segments that could have been drawn, N.
        beta: 0 corrects nothing, 1 in full.
    """
    weights = (segments * probabilities) ** -beta
    return weights / weights.max(axis=-1, keepdims=True)


def _require_same(stored: Layout, needed: Layout, origin: str) -> None:
    for name, theirs, ours in zip(Layout._fields, stored, needed, strict=True):
        if theirs != ours:
            raise CheckpointError(f"{origin} has segments with {name} {theirs}, and this training needs {ours}")
