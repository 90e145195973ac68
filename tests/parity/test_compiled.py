"""A compiled update is the eager one: same batches, same parameters; and one graph serves all updates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch._dynamo.utils import counters

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from tests.envs import BOX, DICT, ScriptedEnv

# torch's own compiler uses a deprecated function of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

TORQUES = spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "seed": 0, "device": "cpu"}

CASES: dict[str, tuple[Any, spaces.Space, dict[str, Any]]] = {
    "box, clipped values, schedules": (
        DualClipPPO,
        TORQUES,
        {
            "clip_range_vf": "lin_0.2",
            "learning_rate": "lin_1e-3",
            "clip_range": "lin_0.3",
            "clip_range_high": 0.4,
            "ent_coef": "lin_0.01",
        },
    ),
    "discrete, stopping": (DualClipPPO, spaces.Discrete(3), {"target_kl": 2e-4, "learning_rate": 1e-3, "n_epochs": 3}),
    "multi-discrete": (AdaptiveKLPPO, spaces.MultiDiscrete([3, 2]), {"ent_coef": 0.01}),
    "multi-binary, clipped": (AdaptiveKLPPO, spaces.MultiBinary(3), {"clip_range": 0.2}),
    "gsde": (DualClipPPO, TORQUES, {"use_sde": True, "dual_clip": None}),
    "gsde, squashed": (
        DualClipPPO,
        TORQUES,
        {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}},
    ),
    "trpo's critic": (TRPO, TORQUES, {"n_critic_updates": 2}),
    "reinforce's critic": (REINFORCE, TORQUES, {"baseline": "value", "n_critic_updates": 2}),
    "dict with an image": (DualClipPPO, spaces.Discrete(3), {"obs_space": DICT}),
}


def make_model(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> Any:
    obs_space = kwargs.pop("obs_space", BOX)
    env = make_vec_env(lambda: ScriptedEnv(obs_space, action_space), n_envs=2, seed=0)
    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    if issubclass(algorithm, (DualClipPPO, AdaptiveKLPPO)):
        kwargs.setdefault("n_epochs", 1)
    settings = {**SMALL, **kwargs}
    if algorithm is REINFORCE:
        del settings["n_steps"]
    return algorithm(policy, env, **settings)


@pytest.mark.parametrize("case", CASES)
def test_compiled_update_is_the_eager_one(case: str) -> None:
    algorithm, action_space, kwargs = CASES[case]
    models = [make_model(algorithm, action_space, torch_compile=compiled, **kwargs) for compiled in (False, True)]
    for model in models:
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        th.manual_seed(0)
        model.set_random_seed(0)
        # Two updates of three: moments and schedules have moved, and no clip range is 0 yet, which is all kink
        model.learn(384, callback=lambda variables, _: variables["self"].num_timesteps < 257)
    eager, compiled = models
    assert eager._n_updates == compiled._n_updates
    if "target_kl" in kwargs:
        assert eager._n_updates < 6  # it did stop
    for p, q in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        assert (p - q).abs().max().item() <= 1e-5
        state, compiled_state = eager.policy.optimizer.state.get(p), compiled.policy.optimizer.state.get(q)
        assert bool(state) == bool(compiled_state)
        if state:
            assert state["step"].item() == compiled_state["step"].item()
            th.testing.assert_close(state["exp_avg"], compiled_state["exp_avg"], atol=1e-5, rtol=1e-3)
    theirs, ours = eager.logger.name_to_value, compiled.logger.name_to_value
    assert theirs.keys() == ours.keys()
    for name in theirs:
        if name.startswith("train/") and isinstance(theirs[name], float):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_no_graph_is_compiled_after_the_first_update() -> None:
    """While schedules move, and through saving, loading and a changed learning rate."""
    model = make_model(
        AdaptiveKLPPO,
        spaces.Discrete(3),
        learning_rate="lin_1e-3",
        clip_range="lin_0.2",
        ent_coef="lin_0.01",
        torch_compile=True,
    )
    model.learn(128)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    model.learn(512, reset_num_timesteps=False)
    model.lr_schedule = lambda _: 5e-4
    model.clip_range = 0.1
    model.learn(256, reset_num_timesteps=False)
    assert counters["stats"]["unique_graphs"] == before


def test_one_graph_serves_rollouts_of_all_sizes() -> None:
    model: Any = REINFORCE(
        "MlpPolicy", "CartPole-v1", baseline="value", episodes_per_env=2, seed=0, device="cpu", torch_compile=True
    )
    model.learn(100)
    before = counters["stats"]["unique_graphs"]
    sizes: list[int] = []
    train = model.train

    def noted() -> None:
        sizes.append(model.rollout_buffer.buffer_size)
        train()

    model.train = noted
    model.learn(1500)
    assert len(set(sizes)) > 5
    assert counters["stats"]["unique_graphs"] == before


def test_a_graph_is_used_for_the_sizes_only_that_it_is_for() -> None:
    """The first rollout is one minibatch, of 4 samples; the second has 33, in minibatches of 32 and 1."""
    script = ((4, True, False), (33, True, False))
    models: list[Any] = []
    for compiled in (False, True):
        before = counters["stats"]["unique_graphs"]
        env = make_vec_env(lambda: ScriptedEnv(BOX, TORQUES, script), seed=0)
        kwargs: dict[str, Any] = {"baseline": "value", "episodes_per_env": 1, "batch_size": 32, "n_critic_updates": 2}
        model = REINFORCE("MlpPolicy", env, seed=0, device="cpu", torch_compile=compiled, **kwargs)
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        models.append(model.learn(37))
    assert counters["stats"]["unique_graphs"] == before + 3  # the evaluation, the step, and the step for one sample
    eager, compiled_model = models
    assert eager._n_updates == compiled_model._n_updates == 2
    for p, q in zip(eager.policy.parameters(), compiled_model.policy.parameters(), strict=True):
        assert (p - q).abs().max().item() <= 1e-5


def test_save_and_load_continue_compiled_as_eager(tmp_path: Any) -> None:
    """The optimiser's moments are back in the optimiser after each update, so that a saved model has them."""
    model = make_model(DualClipPPO, spaces.Discrete(3), torch_compile=True)
    model.learn(256)
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env=model.env, torch_compile=False)
    for p, q in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(p, q)
        assert th.equal(model.policy.optimizer.state[p]["exp_avg_sq"], loaded.policy.optimizer.state[q]["exp_avg_sq"])
        assert loaded.policy.optimizer.state[q]["step"].item() == 8
    loaded.learn(128, reset_num_timesteps=False)


def test_what_cannot_be_compiled_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_baselines3.common.policies import ActorCriticPolicy

    class Custom(ActorCriticPolicy):
        def predict_values(self, obs: Any) -> th.Tensor:
            return super().predict_values(obs)

    with pytest.raises(ValueError, match="torch_compile=True is not allowed with policy=Custom"):
        DualClipPPO(Custom, "CartPole-v1", device="cpu", torch_compile=True)
    with pytest.raises(ValueError, match="with optimizer_class=RMSprop"):
        DualClipPPO(
            "MlpPolicy",
            "CartPole-v1",
            device="cpu",
            torch_compile=True,
            policy_kwargs={"optimizer_class": th.optim.RMSprop},
        )
    with pytest.raises(ValueError, match="amsgrad"):
        DualClipPPO(
            "MlpPolicy",
            "CartPole-v1",
            device="cpu",
            torch_compile=True,
            policy_kwargs={"optimizer_kwargs": {"amsgrad": True}},
        )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/with a space")
    with pytest.raises(ValueError, match=r"cache in '/with a space'.*set TORCHINDUCTOR_CACHE_DIR"):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", torch_compile=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"without a C\+\+ compiler: install g\+\+"):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", torch_compile=True)
