"""What REINFORCE does otherwise than the rest: whole episodes, baselines, its limits, its logs, its bad arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_ext import REINFORCE, reinforce
from sb3_ppo_ext.common.saving.checkpoint import resume, save_checkpoint
from tests.algorithms import assert_close_policies, parameters
from tests.custom import OverridesForward
from tests.envs import BOX, DICT, IMAGE, LargeReward, ScriptedEnv, scripted
from tests.pairwise import pairwise

BASELINES = ("none", "mean", "optimal", "leave_one_out", "value")
TORQUES = spaces.Box(-2.0, 2.0, (3,), np.float32)


def agent(env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> REINFORCE:
    return REINFORCE(
        policy, choices() if env is None else env, **{"episodes_per_env": 2, "seed": 0, "device": "cpu", **kwargs}
    )


def choices(**kwargs: Any) -> VecEnv:
    """Two scripted environments with three actions."""
    return scripted(BOX, spaces.Discrete(3), **kwargs)


def same(a: list[th.Tensor], b: list[th.Tensor]) -> bool:
    return all(map(th.equal, a, b))


def has_learnt(model: REINFORCE, before: list[th.Tensor]) -> None:
    """The actor moved, and nothing became infinite."""
    after = parameters(model)
    assert all(bool(p.isfinite().all()) for p in after)
    names = [name for name, _ in model.policy.named_parameters()]
    moved = [name for name, p, q in zip(names, before, after, strict=True) if not th.equal(p, q)]
    assert "action_net.weight" in moved
    assert ("value_net.weight" in moved) == (model.baseline == "value")


# --- Every space, every kind of policy

SPACES: dict[str, tuple[str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "discrete": ("MlpPolicy", BOX, spaces.Discrete(3), {}),
    "box": ("MlpPolicy", BOX, TORQUES, {}),
    "multi-discrete": ("MlpPolicy", BOX, spaces.MultiDiscrete([3, 2, 4]), {}),
    "multi-binary": ("MlpPolicy", BOX, spaces.MultiBinary(3), {}),
    "discrete observation": ("MlpPolicy", spaces.Discrete(5), spaces.Discrete(3), {}),
    "dict": ("MultiInputPolicy", DICT, TORQUES, {}),
    "dict, separate extractors": (
        "MultiInputPolicy",
        DICT,
        spaces.Discrete(3),
        {"policy_kwargs": {"share_features_extractor": False}},
    ),
    "image": ("CnnPolicy", IMAGE, spaces.Discrete(3), {}),
    "image, separate extractors": (
        "CnnPolicy",
        IMAGE,
        TORQUES,
        {"policy_kwargs": {"share_features_extractor": False}},
    ),
    "gsde": ("MlpPolicy", BOX, TORQUES, {"use_sde": True, "sde_sample_freq": 4}),
    "gsde, one noise a batch": ("MlpPolicy", BOX, TORQUES, {"use_sde": True}),
    "gsde, squashed": (
        "MlpPolicy",
        BOX,
        TORQUES,
        {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}},
    ),
}


@pytest.mark.parametrize("baseline", ["none", "optimal", "value"])
@pytest.mark.parametrize("case", SPACES)
def test_every_kind_of_policy_learns(case: str, baseline: Any) -> None:
    policy, obs_space, action_space, kwargs = SPACES[case]
    model = agent(scripted(obs_space, action_space), policy, baseline=baseline, **kwargs)
    before = parameters(model)
    model.learn(30)
    assert model._n_updates >= 2
    has_learnt(model, before)
    assert model.env is not None
    obs = model.env.reset()
    actions, _ = model.predict(obs, deterministic=True)  # type: ignore[arg-type]
    assert all(action_space.contains(action) for action in actions)


@pytest.mark.parametrize(
    ("returns", "discount_from", "baseline", "normalize_advantage"),
    pairwise(["reward_to_go", "total"], ["present", "start"], BASELINES, [False, True]),
)
def test_every_pair_of_settings_learns(
    returns: Any, discount_from: Any, baseline: Any, normalize_advantage: bool
) -> None:
    model = agent(
        returns=returns, discount_from=discount_from, baseline=baseline, normalize_advantage=normalize_advantage
    )
    before = parameters(model)
    has_learnt(model.learn(30), before)


@pytest.mark.parametrize("baseline", ["leave_one_out", "optimal", "value"])
def test_custom_policy_learns_the_same(baseline: Any) -> None:
    """By SB3's methods a policy learns what the same one learns the fast way."""
    theirs = agent(policy=OverridesForward, baseline=baseline, learning_rate=1e-2).learn(60)
    assert theirs.policy.n_calls > 0  # by SB3's methods, that is
    ours = agent(baseline=baseline, learning_rate=1e-2).learn(60)
    assert_close_policies(theirs, ours, atol=1e-5, rtol=1e-4)


def test_dropout_does_not_reach_the_update() -> None:
    """The gradient is of the probabilities that the actions were drawn with: without dropout, in both."""

    class Dropping(ActorCriticPolicy):
        def _build_mlp_extractor(self) -> None:
            super()._build_mlp_extractor()
            self.mlp_extractor.policy_net.append(th.nn.Dropout(0.9))

    with_dropout = agent(policy=Dropping, learning_rate=1e-2).learn(60)
    without = agent(learning_rate=1e-2).learn(60)
    assert same(parameters(with_dropout), parameters(without))


@pytest.mark.parametrize("policy_kwargs", [{}, {"share_features_extractor": False}, {"net_arch": [8]}])
def test_critic_leaves_the_actor_alone(policy_kwargs: dict[str, Any]) -> None:
    """Whatever they share: of one batch the actor learns the same, to the bit, however often the critic learns."""

    def logits_after(n_critic_updates: int) -> th.Tensor:
        env = scripted(IMAGE, spaces.Discrete(3))
        model = agent(
            env, "CnnPolicy", baseline="value", policy_kwargs=policy_kwargs, n_critic_updates=n_critic_updates
        )
        model.learn(1)
        obs, _ = model.policy.obs_to_tensor(env.reset())
        with th.no_grad():
            logits: th.Tensor = model.policy.get_distribution(obs).distribution.logits
        return logits

    assert th.equal(logits_after(1), logits_after(5))


# --- Episodes that never end


class Endless(ScriptedEnv):
    def __init__(self) -> None:
        super().__init__(BOX, spaces.Discrete(2), ((10**9, True, False),))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_an_episode_that_never_ends(n_envs: int) -> None:
    env = make_vec_env(Endless, n_envs=n_envs)
    model = agent(env, max_episode_steps=50)
    with pytest.raises(ValueError, match=r"max_episode_steps=50 .*TimeLimit"):
        model.learn(1000)
    assert model.num_timesteps == 50 * n_envs


def test_an_episode_of_just_that_length_is_fine() -> None:
    env = choices(script=((5, True, False),))
    agent(env, max_episode_steps=5).learn(20)
    with pytest.raises(ValueError, match="max_episode_steps=4"):
        agent(env, max_episode_steps=4).learn(20)


def test_a_waiting_environment_may_run_longer() -> None:
    """Its episode is not learnt from. It is done after 2 steps and runs on for 38, the other after 40."""
    scripts = iter([((1, True, False), (1, True, False), (10**9, True, False)), ((20, True, False),)])
    env = make_vec_env(lambda: ScriptedEnv(BOX, spaces.Discrete(2), next(scripts)), n_envs=2)
    model = agent(env, max_episode_steps=25)
    model.learn(1)
    assert model.num_timesteps == 80
    with pytest.raises(ValueError, match="max_episode_steps=25"):  # now it is waited for
        model.learn(1, reset_num_timesteps=False)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_the_limit_follows_from_the_steps_to_be_made(n_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reinforce._MIN_EPISODE_LIMIT == 10_000
    monkeypatch.setattr(reinforce, "_MIN_EPISODE_LIMIT", 50)
    model = agent(make_vec_env(Endless, n_envs=n_envs))
    for total, steps in ((300, 300), (10, 50 * n_envs)):
        before = model.num_timesteps
        message = (
            rf"within {steps // n_envs} steps, .*max_episode_steps=None .*total_timesteps={total} .*{n_envs} environ"
        )
        with pytest.raises(ValueError, match=message):
            model.learn(total, reset_num_timesteps=False)
        assert model.num_timesteps - before == steps


def test_the_limit_is_no_less_than_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce, "_MIN_EPISODE_LIMIT", 50)
    spec = gym.envs.registration.EnvSpec("Endless-v0", Endless, max_episode_steps=70)
    model = agent(make_vec_env(lambda: gym.make(spec), n_envs=2)).learn(1)
    assert model.num_timesteps == 2 * 2 * 70


def test_time_limit_is_the_remedy() -> None:
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(Endless(), 7), n_envs=1)
    model = agent(env, max_episode_steps=50).learn(1)
    assert model.num_timesteps == 14


# --- Bad arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate=-1.0 .*at least 0"),
        ({"learning_rate": "log_1"}, "learning_rate='log_1' .*'lin_3e-4'"),
        ({"episodes_per_env": 0}, "episodes_per_env=0 .*at least 1"),
        ({"episodes_per_env": 1.5}, "episodes_per_env=1.5 .*an integer"),
        ({"gamma": 1.5}, "gamma=1.5 .*at most 1"),
        ({"ent_coef": -0.1}, "ent_coef=-0.1 .*at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 .*above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan .*above 0"),
        ({"use_sde": 1, "env": scripted(BOX, TORQUES)}, "use_sde=1 .*True or False"),
        ({"sde_sample_freq": -2}, "sde_sample_freq=-2 .*at least -1"),
        ({"normalize_advantage": "yes"}, "normalize_advantage='yes' .*True or False"),
        ({"returns": "discounted"}, "returns='discounted' .*'reward_to_go', 'total'"),
        ({"baseline": "loo"}, "baseline='loo' .*'none', 'mean', 'optimal', 'leave_one_out', 'value'"),
        ({"baseline": None}, "baseline=None .*'none', 'mean'"),
        ({"discount_from": "now"}, "discount_from='now' .*'present', 'start'"),
        ({"bootstrap_timeouts": 1}, "bootstrap_timeouts=1 .*True or False"),
        ({"bootstrap_timeouts": True}, "bootstrap_timeouts=True with baseline='none' .*baseline='value'"),
        ({"n_critic_updates": 0}, "n_critic_updates=0 .*at least 1"),
        ({"batch_size": 0}, "batch_size=0 .*at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps=0 .*at least 1"),
        ({"max_episode_steps": 1.5}, "max_episode_steps=1.5 .*an integer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(**kwargs)


@pytest.mark.parametrize("baseline", ["mean", "optimal", "leave_one_out"])
def test_one_episode_has_no_others(baseline: Any) -> None:
    message = f"episodes_per_env=1 with 1 environment.*baseline='{baseline}'.*at least two"
    with pytest.raises(ValueError, match=message):
        agent(choices(n_envs=1), episodes_per_env=1, baseline=baseline)
    agent(choices(n_envs=2), episodes_per_env=1, baseline=baseline).learn(1)
    agent(choices(n_envs=1), episodes_per_env=2, baseline=baseline).learn(1)


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_one_episode_is_enough_for(baseline: Any) -> None:
    model = agent(choices(n_envs=1), episodes_per_env=1, baseline=baseline, normalize_advantage=True)
    before = parameters(model)
    has_learnt(model.learn(20), before)


def test_an_action_space_that_cannot_be_learnt_is_refused() -> None:
    with pytest.raises(ValueError, match="Tuple"):
        agent(scripted(BOX, spaces.Tuple((spaces.Discrete(2),))))


# --- Saving


@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_what_is_loaded_goes_on_as_what_was_saved(tmp_path: Path, baseline: Any) -> None:
    """What is loaded continues as what was saved."""
    saved = agent(baseline=baseline, learning_rate=1e-2, gamma=0.7, max_episode_steps=77).learn(40)
    saved.save(tmp_path / "agent")
    loaded = REINFORCE.load(tmp_path / "agent", env=choices(), device="cpu")
    for name in ("episodes_per_env", "baseline", "returns", "discount_from", "gamma", "max_episode_steps"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert (loaded.num_timesteps, loaded._n_updates) == (saved.num_timesteps, saved._n_updates)
    assert same(parameters(loaded), parameters(saved))

    saved.set_env(choices())
    results = []
    for model in (saved, loaded):
        model.set_random_seed(5)
        model.learn(40, reset_num_timesteps=False)
        results.append(parameters(model))
    assert same(*results)
    assert loaded.num_timesteps == saved.num_timesteps > 80


def test_saved_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    def save(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        locals_["self"].save(tmp_path / "agent")
        return True

    agent().learn(20, callback=save)
    loaded = REINFORCE.load(tmp_path / "agent", env=choices(), device="cpu")
    before = parameters(loaded)
    has_learnt(loaded.learn(20), before)


def test_loaded_to_be_watched(tmp_path: Path) -> None:
    """In one environment, where it could not learn: a batch of one episode has no others."""
    agent(episodes_per_env=1, baseline="mean").learn(1).save(tmp_path / "agent")
    model = REINFORCE.load(tmp_path / "agent", env=choices(n_envs=1), device="cpu")
    assert model.env is not None
    model.predict(model.env.reset())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="episodes_per_env=1 with 1 environment"):
        model.learn(1)
    REINFORCE.load(tmp_path / "agent", device="cpu").predict(BOX.sample())


# --- Several learn() calls, callbacks


def test_learn_begins_anew_or_goes_on() -> None:
    model = agent()
    for n_updates in (1, 2):
        before = parameters(model)
        model.learn(1)
        has_learnt(model, before)
        assert model._n_updates == n_updates
    steps = model.num_timesteps
    model.learn(1, reset_num_timesteps=False)
    assert model.num_timesteps > steps


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_callback_stops_and_learning_goes_on(stop_at: int) -> None:
    model = agent()
    before = parameters(model)
    calls = []

    def stop(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        assert {"self", "env", "actions", "rewards", "dones", "infos", "new_obs", "n_steps"} <= set(locals_)
        calls.append(locals_["n_steps"])
        return len(calls) < stop_at

    model.learn(1000, callback=stop)
    assert len(calls) == stop_at
    assert model.num_timesteps == 2 * stop_at
    assert same(before, parameters(model))
    model.learn(1, reset_num_timesteps=False)
    has_learnt(model, before)


def test_no_environment_is_reset_in_the_middle_of_an_episode() -> None:
    """Neither between batches, nor between calls of learn(), nor after a callback has stopped one."""
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0, monitor_kwargs={"allow_early_resets": False})
    model = agent(env, episodes_per_env=1).learn(200)
    assert model._n_updates >= 2
    for stop in (False, True, False, True, False):
        model.learn(100, callback=lambda locals_, globals_, stop=stop: not stop, reset_num_timesteps=False)  # type: ignore[misc]


def test_what_a_stopped_rollout_ended_with_is_acted_on() -> None:
    """The observation after its last step, not the one before."""

    class Counting(gym.Env[Any, Any]):
        observation_space = spaces.Box(0.0, 1000.0, (1,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.count = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            self.count += 1
            return np.full(1, self.count, np.float32), 1.0, self.count == 5, False, {}

    model = agent(make_vec_env(Counting, n_envs=2), episodes_per_env=1)
    model.learn(10, callback=lambda locals_, globals_: locals_["n_steps"] < 2)
    assert np.asarray(model._last_obs).flatten().tolist() == [3.0, 3.0]
    assert model._last_episode_starts is not None
    assert not model._last_episode_starts.any()
    model.learn(1, reset_num_timesteps=False)
    assert model.num_timesteps == 2 * (5 + 5)  # to the end of what had been begun, and one more


def test_goes_on_with_other_environments(tmp_path: Path) -> None:
    """What stood in the middle of an episode is left behind with the environments that stood there."""
    model = agent(make_vec_env("CartPole-v1", n_envs=2, seed=0)).learn(200)
    assert model._last_episode_starts is not None
    assert not model._last_episode_starts.all()
    save_checkpoint(model, tmp_path / "agent.zip")
    loaded = REINFORCE.load(tmp_path / "agent", env=make_vec_env("CartPole-v1", n_envs=3, seed=0), device="cpu")
    resumed = resume(REINFORCE, tmp_path / "agent.zip", make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    for other in (loaded, resumed):
        other.learn(1, reset_num_timesteps=False)
        assert other._n_updates == model._n_updates + 1


# --- Numbers that are not finite


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_gradient_that_is_not_finite_skips_the_update(baseline: Any) -> None:
    env = make_vec_env(lambda: LargeReward(ScriptedEnv(BOX, spaces.Discrete(2)), {2}, 1e38), n_envs=2, seed=0)
    model = agent(env, baseline=baseline, learning_rate=1e-2)
    before = parameters(model)
    with pytest.warns(UserWarning, match="REINFORCE left the policy as it was"):
        model.learn(1)
    assert same(before, parameters(model))
    assert not model.policy.optimizer.state
    assert not math.isfinite(model.logger.name_to_value["train/grad_norm"])
    model.learn(1, reset_num_timesteps=False)  # the next batch is learnt from
    has_learnt(model, before)


# --- Determinism


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_same_seed_learns_the_same(n_envs: int, baseline: Any) -> None:
    def run(seed: int) -> list[th.Tensor]:
        env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=seed)
        return parameters(agent(env, baseline=baseline, seed=seed, learning_rate=1e-2).learn(300))

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


# --- Logs and wrappers


def test_log_keys() -> None:
    model = agent(scripted(BOX, TORQUES), baseline="value").learn(1)
    logged = model.logger.name_to_value
    names = (
        "policy_gradient_loss entropy_loss ent_coef grad_norm value_loss explained_variance std learning_rate n_updates"
    )
    assert {key for key in logged if key.startswith("train/")} == {f"train/{name}" for name in names.split()}
    assert all(math.isfinite(value) for value in logged.values())
    assert logged["train/std"] == pytest.approx(1.0, abs=0.01)
    assert logged["train/n_updates"] == 1


def test_log_keys_without_critic_and_std() -> None:
    logged = agent(baseline="mean").learn(1).logger.name_to_value
    names = "policy_gradient_loss entropy_loss ent_coef grad_norm learning_rate n_updates"
    assert {key for key in logged if key.startswith("train/")} == {f"train/{name}" for name in names.split()}


def test_a_schedule_of_the_learning_rate_ends_at_zero() -> None:
    """The Zoo's string: of what is left after so many of the steps; never below 0, though a batch overshoots."""
    model = agent(choices(script=((5, True, False),)), learning_rate="lin_0.1", episodes_per_env=1)
    model.learn(40)
    assert model.num_timesteps == 40
    assert model.logger.name_to_value["train/learning_rate"] == 0.0
    model.learn(15)
    assert model.num_timesteps == 20
    assert model.logger.name_to_value["train/learning_rate"] == 0.0


def test_normalised_rewards_are_learnt_from() -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0), gamma=0.99)
    model = agent(env, baseline="value", bootstrap_timeouts=True, learning_rate=1e-2)
    before = parameters(model)
    model.learn(500)
    has_learnt(model, before)
    rewards = model.rollout_buffer.rewards
    assert ((rewards > 0.0) & (rewards < 1.0)).all()  # CartPole's own are all 1
    assert model.ep_info_buffer is not None
    assert all(info["r"] == info["l"] for info in model.ep_info_buffer)  # the statistics are CartPole's own


def test_an_environment_may_be_given_by_its_name() -> None:
    model = REINFORCE("MlpPolicy", "CartPole-v1", episodes_per_env=1, device="cpu")
    before = parameters(model)
    has_learnt(model.learn(1), before)
