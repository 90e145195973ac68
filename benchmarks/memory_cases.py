"""The tasks of :mod:`benchmarks.memory`: what counts as solved, how far a policy without memory gets, how to train."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from sb3_ppo_ext.zoo import config_path


class Task(NamedTuple):
    """
    :param solved: the least mean reward of an episode that counts as solved
    :param bound: what the best policy without memory has
    :param n_episodes: in which a trained agent shows what it can
    :param deterministic: whether it takes its likeliest actions, or draws them
    """

    solved: float
    bound: float
    n_episodes: int = 100
    deterministic: bool = True


TASKS = {
    # The sign is drawn by a fair coin and the junction looks the same after both. A policy without memory turns left
    # there with one and the same probability p, and is right with 0.5 p + 0.5 (1 - p) = 0.5. Actions are drawn, as the
    # likeliest of such a policy may be to stay at the junction.
    "TMaze-v0": Task(solved=0.95, bound=0.5, n_episodes=500, deterministic=False),
    # The symbols are independent of each other, so the present one says nothing of the one to name: any guess is right
    # with 1/4, and the mean reward is 1/4 - 3/4. Solved means that 9 of 10 answers are right: 0.9 - 0.1.
    "RepeatPrevious-v0": Task(solved=0.8, bound=-0.5),
    # No closed form is known. Of 4000 policies drawn at random that push right with a probability of
    # sigmoid(a x + b theta + c), the best keeps the pole up for 58 steps on average: whoever sees no velocity can push
    # the pole back, but cannot damp its swinging. Solved is gymnasium's threshold for CartPole-v1.
    "CartPoleNoVel-v1": Task(solved=475.0, bound=58.0),
    # Likewise: of 6000 torques drawn at random that depend on the angle alone (linear in its sines and cosines, with or
    # without noise, or piecewise constant), the best has -1028. Such a torque is conservative: it cannot damp. Solved
    # is what the learning tests ask of Pendulum-v1.
    "PendulumNoVel-v1": Task(solved=-300.0, bound=-1028.0),
    # A shuffled deck of 52 cards, 13 of each suit; named is the suit of a card that was seen three steps ago. Given the
    # present suit, that card has each other suit with 13/51 and the same with 12/51: 2 * 13/51 - 1.
    "popgym-RepeatPreviousEasy-v0": Task(solved=0.8, bound=-0.49),
    # The same deck; named is the suit of the first card, at each of 51 steps. At the first step that card is in sight;
    # at the others, the suit in sight is right with 12/51, and each other suit with 13/51. To name always the suit in
    # sight is right in (1 + 50 * 12/51) / 51 = 25.03 % of the steps, to name another in 50 * 13/51 / 51 = 24.99 %.
    "popgym-RepeatFirstEasy-v0": Task(solved=0.8, bound=-0.499),
}

# The settings of the tasks that zoo_configs/ has no entry for.
_COMMON: dict[str, Any] = {
    "n_envs": 8,
    "policy": "MlpLstmPolicy",
    "policy_kwargs": {"lstm_hidden_size": 32, "net_arch": [64]},
}
_PROXIMAL: dict[str, Any] = {"n_steps": 64, "batch_size": 128, "n_epochs": 10, "learning_rate": "lin_3e-3"}
_OF_ALGO: dict[str, dict[str, Any]] = {
    "dual_clip_ppo": {**_PROXIMAL, "sequence_length": 64},
    "adaptive_kl_ppo": {**_PROXIMAL, "sequence_length": 32, "target_kl": 0.03, "clip_range": None},
    # What a memory is to learn from is a weak signal at first, to which a damped step is blind.
    "trpo_ext": {
        "n_steps": 128,
        "batch_size": 256,
        "n_critic_updates": 5,
        "target_kl": "lin_0.05",
        "cg_damping": 1e-4,
        "sequence_length": 32,
    },
    "reinforce": {
        "episodes_per_env": 1,
        "learning_rate": "lin_1e-2",
        "baseline": "mean",
        "normalize_advantage": True,
    },
}
# The discount factor and the steps. An answer changes nothing of what comes later, where symbols or suits are to be
# named, so rewards to come are noise.
_ANSWERS = {"dual_clip_ppo": 60_000, "adaptive_kl_ppo": 60_000, "trpo_ext": 100_000, "reinforce": 500_000}
_OF_TASK: dict[str, tuple[float, dict[str, int]]] = {
    "TMaze-v0": (0.95, {"dual_clip_ppo": 60_000, "adaptive_kl_ppo": 60_000, "trpo_ext": 150_000, "reinforce": 300_000}),
    "RepeatPrevious-v0": (0.0, _ANSWERS),
    "popgym-RepeatPreviousEasy-v0": (0.0, _ANSWERS),
    "popgym-RepeatFirstEasy-v0": (0.0, _ANSWERS),
}
# In the T-maze the only reward comes at the end, and without noise. With a smaller lambda, some trainings get stuck
# where the agent always turns to the same side.
_PROXIMAL_IN_TMAZE = {"gamma": 0.99, "gae_lambda": 1.0}

# Not trained: a batch of REINFORCE, an episode of each environment, is 1600 steps of this task; 300 000 steps are 190
# updates, in which it learns nothing.
LEFT_OUT = {("PendulumNoVel-v1", "reinforce")}

# What a policy without memory does not have.
_OF_MEMORY = {"lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "lstm_kwargs", "rnn_type"}


def settings(task: str, algo: str, memory: bool) -> dict[str, Any]:
    """
    :param task: one of :data:`TASKS`
    :param algo: the algorithm's key, e.g. ``dual_clip_ppo``
    :param memory: with a recurrent policy, or with one that is the same otherwise
    :return: the hyper-parameters, as an entry of rl_zoo3's configurations has them
    """
    entries = yaml.safe_load(config_path(algo).read_text())
    entry: dict[str, Any] | None = entries.get(task)
    if entry is None:
        gamma, n_timesteps = _OF_TASK[task]
        entry = {**_COMMON, **_OF_ALGO[algo], "gamma": gamma, "n_timesteps": n_timesteps[algo]}
        if task == "TMaze-v0" and algo in ("dual_clip_ppo", "adaptive_kl_ppo"):
            entry |= _PROXIMAL_IN_TMAZE
    if memory:
        return entry
    policy_kwargs = {name: value for name, value in entry["policy_kwargs"].items() if name not in _OF_MEMORY}
    rest = {name: value for name, value in entry.items() if name != "sequence_length"}
    return {**rest, "policy": "MlpPolicy", "policy_kwargs": policy_kwargs}
