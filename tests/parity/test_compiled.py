"""What is compiled computes what the eager code computes, and one program serves all updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common import compiled as compiling
from tests.envs import BOX, DICT, ScriptedEnv

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


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled, as it is."""
    made: list[str] = []
    compiled = compiling.Program._compiled

    def noted(self: compiling.Program, more: tuple[Any, ...]) -> compiling.Run:
        made.append(self._what)
        return compiled(self, more)

    monkeypatch.setattr(compiling.Program, "_compiled", noted)
    return made


def trained_both_ways(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> list[Any]:
    models = []
    for compiled in (False, True):
        model = make_model(algorithm, action_space, torch_compile=compiled, **kwargs)
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        th.manual_seed(0)
        model.set_random_seed(0)
        # Two updates of three: moments and schedules have moved, and no clip range is 0 yet, which is all kink
        models.append(model.learn(384, callback=lambda variables, _: variables["self"].num_timesteps < 257))
    return models


@contextlib.contextmanager
def same_batch() -> Iterator[None]:
    """Actions that differ in the last bit are another batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling.CompiledActor, "act", lambda self, obs: self._module._function.__self__.act(obs))
        yield


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager(case: str) -> None:
    algorithm, action_space, kwargs = CASES[case]
    with same_batch():
        eager, compiled = trained_both_ways(algorithm, action_space, **kwargs)
    agree_after_updates(eager, compiled, stops="target_kl" in kwargs)
    agree_on_rollouts(compiled)


def agree_after_updates(eager: Any, compiled: Any, *, stops: bool) -> None:
    assert eager._n_updates == compiled._n_updates
    if stops:
        assert eager._n_updates < 6  # it did
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


def agree_on_rollouts(model: Any) -> None:
    """Actions, from the same random numbers, and what is evaluated of them."""
    eager = model._actor_critic()
    act, evaluate_actions = model._for_rollout(eager)
    obs = obs_as_tensor(model.env.reset(), model.device)
    results = []
    for function in (eager.act, act):
        th.manual_seed(1)
        results.append(function(obs))
    (expected, kept), (actions, our_kept) = results
    th.testing.assert_close(actions, expected, atol=1e-6, rtol=1e-5)
    assert (kept is None) == (our_kept is None)
    if kept is not None:
        th.testing.assert_close(our_kept.values, kept.values)
        th.testing.assert_close(our_kept.params, kept.params)
        return
    batch = model.rollout_buffer.flat_inputs()
    with th.no_grad():
        evaluation, ours = eager.evaluate_actions(*batch), evaluate_actions(*batch)
    th.testing.assert_close(ours.values, evaluation.values, atol=1e-5, rtol=1e-4)
    th.testing.assert_close(ours.log_prob, evaluation.log_prob, atol=1e-4, rtol=1e-4)
    th.testing.assert_close(ours.params, evaluation.params, atol=1e-5, rtol=1e-4)


def test_nothing_is_compiled_after_the_first_update(programs: list[str]) -> None:
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
    assert programs == ["the actor", "the evaluation of rollouts", "the gradient step"]
    model.learn(512, reset_num_timesteps=False)
    model.lr_schedule = lambda _: 5e-4
    model.clip_range = 0.1
    model.learn(256, reset_num_timesteps=False)
    assert len(programs) == 3


def test_a_later_run_finds_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Also where what it finds is not whole, or is of another network."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    package = th._inductor.aoti_compile_and_package

    def noted(*args: Any, **kwargs: Any) -> str:
        compiled.append("")
        return package(*args, **kwargs)

    monkeypatch.setattr(th._inductor, "aoti_compile_and_package", noted)

    def doubled(width: int) -> list[float]:
        program = compiling.Program(
            lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="", any_size=False, announce=False
        )
        program.bind([th.ones(width)])
        return program(th.ones(width))[0].tolist()

    assert doubled(2) == doubled(2) == [3.0, 3.0]
    assert len(compiled) == 1
    assert doubled(3) == [3.0, 3.0, 3.0]
    assert len(compiled) == 2
    files = list(tmp_path.glob("sb3_ppo_ext/*"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    assert doubled(2) == [3.0, 3.0]
    assert len(compiled) == 3


def test_one_program_serves_rollouts_of_all_sizes(programs: list[str]) -> None:
    model: Any = REINFORCE(
        "MlpPolicy", "CartPole-v1", baseline="value", episodes_per_env=2, seed=0, device="cpu", torch_compile=True
    )
    model.learn(100)
    assert len(programs) == 3
    sizes: list[int] = []
    train = model.train

    def noted() -> None:
        sizes.append(model.rollout_buffer.buffer_size)
        train()

    model.train = noted
    model.learn(1500)
    assert len(set(sizes)) > 5
    assert len(programs) == 3


def test_a_program_is_used_for_the_sizes_only_that_it_is_for(programs: list[str]) -> None:
    """The first rollout is one minibatch, of 4 samples; the second has 33, in minibatches of 32 and 1."""
    script = ((4, True, False), (33, True, False))
    models: list[Any] = []
    for compiled in (False, True):
        env = make_vec_env(lambda: ScriptedEnv(BOX, TORQUES, script), seed=0)
        kwargs: dict[str, Any] = {"baseline": "value", "episodes_per_env": 1, "batch_size": 32, "n_critic_updates": 2}
        model = REINFORCE("MlpPolicy", env, seed=0, device="cpu", torch_compile=compiled, **kwargs)
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        models.append(model.learn(37))
    assert programs == ["the actor", "the evaluation of rollouts", "the gradient step", "the gradient step"]
    agree_after_updates(*models, stops=False)


class Offset(BaseFeaturesExtractor):
    """Has a tensor that is neither a parameter nor a buffer, and one of two layers' own."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=4)
        n = observation_space.shape[0]
        self.first, self.second = th.nn.Linear(n, 4), th.nn.Linear(n, 4)
        self.second.weight = self.first.weight
        self.offset = th.zeros(n)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.first(observations + self.offset).relu() * self.second(observations).sigmoid()


def test_tensors_that_a_network_keeps_for_itself_or_shares() -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": Offset}}
    models = [make_model(DualClipPPO, TORQUES, torch_compile=compiled, **kwargs) for compiled in (False, True)]
    for model in models:
        th.manual_seed(0)
        for offset in (0.0, 0.5):
            model.policy.features_extractor.offset.fill_(offset)
            np.random.seed(0)  # noqa: NPY002  # the minibatches
            with same_batch():
                model.learn(128)
    agree_after_updates(*models, stops=False)


def rerun(run: compiling.Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """What a CUDA graph does: to run again on the tensors it was recorded with, and to write into what it gave then."""
    for _ in range(3):
        outputs = run(inputs)

    def replay() -> None:
        compiling._copied(outputs, run(inputs))

    return outputs, replay


@pytest.mark.filterwarnings("ignore:batch_size=48 does not divide:UserWarning")
@pytest.mark.parametrize("batch_size", [32, 48])  # the last minibatch is smaller: it is recorded for itself
def test_a_recording_reads_and_writes_where_it_was_made(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """The order of events on a GPU, on the CPU; what CUDA does with it is tested below, where there is one."""
    monkeypatch.setattr(compiling, "_can_record", lambda device: True)
    monkeypatch.setattr(compiling, "_recorded", rerun)
    kwargs: dict[str, Any] = {"learning_rate": "lin_1e-3", "clip_range": "lin_0.3", "batch_size": batch_size}
    with same_batch():
        eager, compiled = trained_both_ways(DualClipPPO, TORQUES, **kwargs)
    agree_after_updates(eager, compiled, stops=False)
    agree_on_rollouts(compiled)
    (runs,) = compiled._compiled["step"][1]._program._runs.values()
    assert [type(run) for run in runs.values()] == [compiling._Recording] * (1 if batch_size == 32 else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager_on_cuda(case: str) -> None:
    algorithm, action_space, kwargs = CASES[case]
    eager, compiled = trained_both_ways(algorithm, action_space, **{**kwargs, "device": "cuda"})
    agree_after_updates(eager, compiled, stops="target_kl" in kwargs)
    agree_on_rollouts(compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
def test_the_minibatches_of_an_update_wait_for_nothing_on_cuda(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch, programs: list[str]
) -> None:
    model = make_model(algorithm, TORQUES, torch_compile=True, device="cuda", n_epochs=3)
    model.learn(128)
    (runs,) = model._compiled["step"][1]._program._runs.values()
    assert [type(run) for run in runs.values()] == [compiling._Recording]
    calls = []

    def alone(function: Any) -> Any:
        def watched(*args: Any) -> Any:
            calls.append(function.__name__)
            th.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                th.cuda.set_sync_debug_mode("default")

        return watched

    bind = compiling.Program.bind

    def bind_before(*args: Any) -> Any:  # once an update
        th.cuda.set_sync_debug_mode("default")
        return bind(*args)

    monkeypatch.setattr(compiling.Program, "bind", bind_before)
    monkeypatch.setattr(compiling.CompiledStep, "__call__", alone(compiling.CompiledStep.__call__))
    monkeypatch.setattr(type(model.rollout_buffer), "shuffled_rows", alone(type(model.rollout_buffer).shuffled_rows))
    model.learn(128, reset_num_timesteps=False)
    assert calls.count("__call__") == 12
    assert calls.count("shuffled_rows") == 3


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
