#!/usr/bin/env bash
# RLlib 2.60.0 takes every vector environment for one that resets itself in the next step, and says nothing where it is not.
#
# Gymnasium's vector environments say in metadata["autoreset_mode"] how they reset themselves. With SAME_STEP the step that
# ends an episode returns the next one's first observation, and the old one's last in infos["final_obs"]. Taken in by
# `gym_env_vectorize_mode="vector_entry_point"`, RLlib looks at neither (rllib/env/single_agent_env_runner.py): every episode
# ends with the next one's first observation, and from the second episode on the first step is dropped, action and reward
# too. Episodes of 5 steps are learned as 4. Other libraries refuse such environments, or read "final_obs".
#
# Seen with ray[rllib]==2.60.0, gymnasium==1.2.2, torch==2.13.0 (CPU), Python 3.11, where an observation is 100 times the
# episode's number and the steps taken in it:
#   5 [0, 1, 2, 3, 4, 100]        should be 5 [0, 1, 2, 3, 4, 5]
#   4 [101, 102, 103, 104, 200]   should be 5 [100, 101, 102, 103, 104, 105]
#   4 [201, 202, 203, 204, 300]   should be 5 [200, 201, 202, 203, 204, 205]
# Exits with 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[rllib]==2.60.0" gymnasium==1.2.2 torch==2.13.0
cat > "$folder/clocks.py" <<'PYTHON'
import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env


class Clocks(gymnasium.vector.VectorEnv):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = gymnasium.spaces.Box(0, 1e6, (1,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episode = -1

    def seen(self):
        return np.full((self.num_envs, 1), 100 * self.episode + self.age, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.age = self.episode + 1, 0
        return self.seen(), {}

    def step(self, actions):
        self.age += 1
        over, infos = self.age == 5, {}
        if over:
            final = np.empty(self.num_envs, object)
            final[:] = list(self.seen())
            infos = {"final_obs": final, "_final_obs": np.ones(self.num_envs, bool)}
            self.reset()
        cut = np.full(self.num_envs, over)
        return self.seen(), np.ones(self.num_envs), np.zeros(self.num_envs, bool), cut, infos


register_env("clocks", lambda config: Clocks(config["num_envs"]))
config = PPOConfig().environment("clocks")
config = config.env_runners(
    num_env_runners=0, num_envs_per_env_runner=1, gym_env_vectorize_mode="vector_entry_point"
)
algorithm = config.build_algo()
episodes = algorithm.env_runner.sample(num_episodes=3)
lines = [(len(episode), [int(number) for number in np.ravel(episode.get_observations())]) for episode in episodes]
algorithm.stop()
for length, observations in lines:
    print(length, observations)
assert lines == [
    (5, [0, 1, 2, 3, 4, 100]),
    (4, [101, 102, 103, 104, 200]),
    (4, [201, 202, 203, 204, 300]),
], "RLlib has changed"
PYTHON
"$folder/venv/bin/python" "$folder/clocks.py" 2> "$folder/log" || { tail -20 "$folder/log" >&2; exit 1; }
