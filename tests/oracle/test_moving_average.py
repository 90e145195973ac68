"""``reuse={"proximal": "ewma"}``: clipping around the moving average of the policies after each gradient step."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import cuda, program
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.saving.checkpoint import resume, save_checkpoint
from sb3_ppo_ext.common.update.moving_average import MovingAverage
from sb3_ppo_ext.common.update.old_rollouts import Reuse
from sb3_ppo_ext.common.update.reference import FrozenPolicy
from tests.algorithms import PROXIMAL, ROLLOUT, assert_close_policies, assert_same_policy, have_moved, parameters, small
from tests.envs import DICT, limited_walk, scripted
from tests.oracle.test_old_rollouts import FAST, TINY_LSTM, N, gaussian_kl, masked_noise
from tests.parity.test_recorded_programs import rerun

EWMA = {"proximal": "ewma"}
pytestmark = pytest.mark.filterwarnings("ignore:batch_size=")
ONE_STEP = {"batch_size": N, "n_epochs": 1}  # an update is one gradient step


def filled(policy: Any, value: float) -> Any:
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(value)
    return policy


@pytest.mark.parametrize(
    ("decay", "means"),
    [
        (0.5, [1.0, 5 / 3, 3.0]),  # 1; (1/2 + 2) / (3/2); (1/4 + 1 + 4) / (7/4)
        (0.0, [1.0, 2.0, 4.0]),  # the policy itself
        (1.0 - 1e-12, [1.0, 1.5, 7 / 3]),  # the plain mean
    ],
)
def test_three_policies_of_one_number_by_hand(decay: float, means: list[float]) -> None:
    """All parameters are theta: of the observation 1, the action is drawn from N(2 theta, exp(theta)^2)."""
    policy = small(DualClipPPO, "MlpPolicy", scripted(), policy_kwargs={"net_arch": []}).policy
    average = MovingAverage(FrozenPolicy(policy))
    n_obs, n_actions = policy.observation_space.shape[0], policy.action_space.shape[0]
    nothing = th.zeros(1)
    obs, actions = th.eye(n_obs)[:1], th.full((1, n_actions), 0.3)
    samples = RolloutSamples(obs, actions, nothing, nothing, nothing, nothing, nothing)
    for _ in range(2):
        for theta, mean in zip((1.0, 2.0, 4.0), means, strict=True):
            around = average.around(filled(policy, theta), samples, decay)
            normal = th.distributions.Normal(2 * mean, th.tensor(mean).exp())
            for parameter in average.policy.parameters():
                th.testing.assert_close(parameter, th.full_like(parameter, mean))
            th.testing.assert_close(around.proximal_log_prob, n_actions * normal.log_prob(th.tensor([0.3])))
            params = th.tensor([[2 * mean] * n_actions + [normal.scale.item()] * n_actions])
            th.testing.assert_close(around.old_params, params)
        average.begin_anew()


def test_by_default_it_is_as_old_as_the_policy_that_acts() -> None:
    """Which in an update of N steps is 0, 1, ..., N - 1 steps old: in the mean, (N - 1) / 2."""
    for n_steps in (1, 2, 320):
        decay = Reuse().decay(n_steps)
        ages = th.arange(100_000, dtype=th.float64)
        weights = decay**ages
        assert ((weights * ages).sum() / weights.sum()).item() == pytest.approx((n_steps - 1) / 2)
    kwargs: dict[str, Any] = {"n_epochs": 3, "batch_size": 12}
    model = small(DualClipPPO, "MlpPolicy", scripted(), n_reused_rollouts=1, reuse=EWMA, **kwargs)
    n_minibatches = 6  # of 12 samples, where there are 2 rollouts of 32
    assert model.coefficients()["ewma_decay"] == pytest.approx((3 * n_minibatches - 1) / (3 * n_minibatches + 1))
    model = small(DualClipPPO, "MlpPolicy", scripted(), reuse={**EWMA, "ewma_decay": 0.25})
    assert model.coefficients()["ewma_decay"] == 0.25
    assert "ewma_decay" not in small(DualClipPPO, "MlpPolicy", scripted()).coefficients()


def seen_of(algorithm: Any, policy: str, env: Any, **kwargs: Any) -> tuple[Any, list[Any], list[Any]]:
    """A model, and of each gradient step that it will make: what its policy is before it, and the samples."""
    states: list[Any] = []
    samples_of_steps: list[Any] = []

    class Watched(algorithm):  # type: ignore[misc]
        @staticmethod
        def policy_loss(evaluation: Any, samples: Any, coefficients: Any) -> Any:
            samples_of_steps.append(samples)
            return algorithm.policy_loss(evaluation, samples, coefficients)

        def _minibatch_step(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
            def watched(actor_critic: Any, *of_loss: Any) -> Any:
                states.append([(name, x.clone()) for name, x in model.policy.state_dict().items()])
                return loss(actor_critic, *of_loss)

            return super()._minibatch_step(watched, *args, **kwargs)

    model = small(Watched, policy, env, **{**FAST, **kwargs})
    return model, states, samples_of_steps


class Normalized(FlattenExtractor):
    """Keeps statistics of what it sees while it is trained."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        normalized: th.Tensor = self.norm(super().forward(observations))
        return normalized


class Tied(FlattenExtractor):
    """Two layers with the same weights, and a number."""

    is_pure = True

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        n = self.features_dim
        self.layers = th.nn.Sequential(th.nn.Linear(n, n), th.nn.Tanh(), th.nn.Linear(n, n))
        self.layers[2].weight = self.layers[0].weight
        self.scale = th.nn.Parameter(th.ones(()))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.scale * self.layers(super().forward(observations))
        return features


@pytest.mark.parametrize(
    ("algorithm", "policy", "make_env", "kwargs"),
    [
        (DualClipPPO, "MlpPolicy", scripted, {}),
        (AdaptiveKLPPO, "MlpPolicy", scripted, {"n_reused_rollouts": 1, "batch_size": 12}),
        (AdaptiveKLPPO, "MultiInputPolicy", lambda: scripted(DICT), {"policy_kwargs": {"net_arch": [4]}}),
        (DualClipPPO, "MlpPolicy", masked_noise, {"n_reused_rollouts": 1}),
        (DualClipPPO, "MlpLstmPolicy", scripted, {"sequence_length": 4, "policy_kwargs": TINY_LSTM}),
        (DualClipPPO, "MlpPolicy", scripted, {"use_sde": True, "recompute_advantages": True}),
        (DualClipPPO, "MlpPolicy", scripted, {"policy_kwargs": {"normalize_observations": True}}),
        (DualClipPPO, "MlpPolicy", scripted, {"policy_kwargs": {"features_extractor_class": Normalized}}),
        (DualClipPPO, "MlpPolicy", scripted, {"policy_kwargs": {"features_extractor_class": Tied}}),
    ],
    ids=["rows", "old data", "dict", "masks", "memory", "gsde", "running statistics", "batch norm", "tied layers"],
)
def test_an_update_clips_around_the_average_by_its_definition(
    algorithm: Any, policy: str, make_env: Any, kwargs: Any
) -> None:
    """
    Of all policies so far, weighted anew at each step; with the buffers of the present one, in evaluation mode; asked
    by SB3's own method where it has one.
    """
    decay = 0.7
    model, states, samples_of_steps = seen_of(
        algorithm, policy, make_env(), reuse={**EWMA, "ewma_decay": decay}, **kwargs
    )
    model.learn(2 * N)
    assert len(states) == len(samples_of_steps) >= 2 * 2 * 4
    asked: Any = copy.deepcopy(FrozenPolicy(model.policy)).policy
    learnt = {name for name, _ in model.policy.named_parameters(remove_duplicate=False)}
    far = 0.0
    for t, samples in enumerate(samples_of_steps):
        weights = [decay ** (t - s) for s in range(t + 1)]
        state = dict(states[t])
        for name in learnt & state.keys():
            mean = sum(w * dict(of)[name].double() for w, of in zip(weights, states, strict=False)) / sum(weights)
            far = max(far, (mean - state[name]).abs().max().item())
            state[name] = mean
        asked.load_state_dict(state)
        with th.no_grad():
            params = direct_actor_critic(asked).params(samples.inputs)
            if policy == "MlpLstmPolicy" or samples.action_masks is not None:
                log_prob = direct_actor_critic(asked).evaluate_actions(samples.inputs, samples.actions).log_prob
            else:
                log_prob = asked.evaluate_actions(samples.observations, samples.actions)[1]
        th.testing.assert_close(samples.proximal_log_prob, log_prob, atol=1e-5, rtol=1e-5)
        th.testing.assert_close(samples.old_params, params, atol=1e-5, rtol=1e-5)
    assert far > 0.01
    assert not any(module.training for module in model._average.policy.modules())


@pytest.mark.parametrize("n_reused_rollouts", [0, 1])
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_with_decay_0_and_one_step_an_update_it_is_the_newest_policy(algorithm: Any, n_reused_rollouts: int) -> None:
    """Of fresh data alone, the one that acted: PPO."""
    kwargs = {**FAST, **ONE_STEP, "n_reused_rollouts": n_reused_rollouts}
    kwargs["batch_size"] *= n_reused_rollouts + 1
    newest = {"proximal": "newest"} if n_reused_rollouts else None
    models = [
        small(algorithm, "MlpPolicy", scripted(), reuse=reuse, **kwargs)
        for reuse in (newest, {**EWMA, "ewma_decay": 0.0})
    ]
    before = parameters(models[0])
    for model in models:
        model.set_random_seed(0)
        model.learn(3 * N)
    assert have_moved(models[0], before)
    assert_close_policies(*models, atol=1e-5)


@pytest.mark.parametrize("clip_range", [0.2, 0.01])
def test_an_average_that_does_not_move_in_an_update_of_fresh_data_is_ppo(
    clip_range: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = MovingAverage.around

    def of_the_first_step(self: MovingAverage, policy: Any, samples: Any, decay: Any) -> RolloutSamples:
        result = around(self, policy, samples, decay)
        self.total_weight.fill_(1e30)  # beside which no other policy weighs anything
        return result

    monkeypatch.setattr(MovingAverage, "around", of_the_first_step)
    kwargs = {**FAST, "clip_range": clip_range, "n_epochs": 4}
    reuse = {**EWMA, "ewma_decay": 1.0 - 1e-12}
    model = small(DualClipPPO, "MlpPolicy", scripted(), reuse=reuse, **kwargs)
    start = parameters(model)
    model.learn(N)
    th.testing.assert_close([*model._average.policy.parameters()], start, atol=1e-20, rtol=0.0)
    assert have_moved(model, start)
    plain = small(DualClipPPO, "MlpPolicy", scripted(), **kwargs).learn(N)
    assert plain.logger.name_to_value["train/clip_fraction"] > 0.0
    assert_close_policies(plain, model, atol=1e-5)
    for key in ("clip_fraction", "approx_kl", "ratio_max"):
        of_both = (of.logger.name_to_value[f"train/{key}"] for of in (plain, model))
        assert next(of_both) == pytest.approx(next(of_both), rel=1e-3, abs=1e-6)


def test_the_penalty_is_on_the_kl_from_the_average() -> None:
    model, _, samples_of_steps = seen_of(AdaptiveKLPPO, "MlpPolicy", scripted(), reuse=EWMA)
    model.learn(2 * N)
    samples = samples_of_steps[-1]
    evaluation = model._actor_critic().evaluate_actions(samples.inputs, samples.actions)
    losses = [
        model.policy_loss(evaluation, samples, {**model.coefficients(), "kl_coef": coef}).loss for coef in (0.0, 1.0)
    ]
    th.testing.assert_close(losses[1] - losses[0], gaussian_kl(samples.old_params, evaluation.params).mean())


@pytest.mark.parametrize(
    ("algorithm", "policy", "kwargs"),
    [
        (
            DualClipPPO,
            "MlpPolicy",
            {"policy_kwargs": {"normalize_observations": True, "features_extractor_class": Tied}},
        ),
        (AdaptiveKLPPO, "MlpPolicy", {"n_reused_rollouts": 1, "batch_size": 12}),
        (
            DualClipPPO,
            "MlpLstmPolicy",
            {"batch_size": 16, "sequence_length": 2, "n_epochs": 1, "policy_kwargs": TINY_LSTM},
        ),
    ],
    ids=["running statistics and tied layers", "old rollouts, uneven minibatches", "memory"],
)
@pytest.mark.usefixtures("without_compiler")
def test_compiled_equals_eager_with_one_program(
    algorithm: Any, policy: str, kwargs: dict[str, Any], programs: list[str]
) -> None:
    """The average lives: it moves within an update, from one to the next, and begins anew with a new training."""
    eager, compiled = (
        small(algorithm, policy, scripted(), reuse=EWMA, torch_compile=of, **{**FAST, **kwargs}) for of in (False, True)
    )
    before = parameters(eager)
    for model in (eager, compiled):
        model.set_random_seed(0)
        model.learn(2 * N)
        model.learn(N)
    assert have_moved(eager, before)
    assert_close_policies(eager, compiled, atol=1e-4)
    th.testing.assert_close(compiled._average.state_dict(), eager._average.state_dict(), atol=1e-4, rtol=1e-4)
    assert programs.count("the gradient step") == 1


@pytest.mark.usefixtures("without_compiler")
def test_a_recording_moves_the_average_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of events on a GPU: it is run some times before it is recorded, and has places of its own."""
    monkeypatch.setattr(program, "can_record", lambda device: True)
    monkeypatch.setattr(cuda, "_recorded", rerun)
    eager, recorded = (
        small(DualClipPPO, "MlpPolicy", scripted(), reuse=EWMA, torch_compile=of, **FAST).learn(3 * N)
        for of in (False, True)
    )
    assert_close_policies(eager, recorded, atol=1e-4)
    th.testing.assert_close(recorded._average.state_dict(), eager._average.state_dict(), atol=1e-4, rtol=1e-4)


def test_an_average_is_of_one_training() -> None:
    model = small(DualClipPPO, "MlpPolicy", scripted(), reuse={**EWMA, "ewma_decay": 0.9}, **FAST, **ONE_STEP)
    weights = []
    for reset in (True, False, True):
        model.learn(2 * N, reset_num_timesteps=reset)
        weights.append(model._average.total_weight.item())
    assert weights == pytest.approx([1.9, 1 + 0.9 + 0.81 + 0.729, 1.9])


def test_an_average_is_not_of_weights_that_others_have_taken_the_place_of() -> None:
    model = small(DualClipPPO, "MlpPolicy", scripted(), reuse={**EWMA, "ewma_decay": 0.9}, **FAST, **ONE_STEP)
    model.learn(2 * N)
    model.set_parameters(small(DualClipPPO, "MlpPolicy", scripted(), seed=5).get_parameters())
    model.learn(N, reset_num_timesteps=False)
    assert model._average.total_weight.item() == 1.0


def test_a_checkpoint_has_the_average_and_a_saved_model_none(tmp_path: Any) -> None:
    def made() -> Any:
        return make_vec_env(limited_walk, 2, seed=0)

    model = small(DualClipPPO, "MlpPolicy", made(), reuse=EWMA, **FAST).learn(2 * N)
    save_checkpoint(model, tmp_path / "checkpoint")
    model.save(tmp_path / "plain")
    model.learn(2 * N, reset_num_timesteps=False)
    resumed = resume(DualClipPPO, tmp_path / "checkpoint", made(), device="cpu")
    assert_same_policy(model, resumed.learn(2 * N, reset_num_timesteps=False))
    th.testing.assert_close(resumed._average.state_dict(), model._average.state_dict(), atol=0.0, rtol=0.0)
    plain = DualClipPPO.load(tmp_path / "plain", made(), device="cpu")
    assert (plain.reuse, plain._average) == (EWMA, None)
    assert have_moved(plain.learn(N, reset_num_timesteps=False), parameters(model))
    assert plain._average.total_weight.item() < model._average.total_weight.item()


def test_processes_begin_with_the_average_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one alone may have from a checkpoint."""

    class Group:
        def take_from_first(self, tensors: Any) -> None:
            for tensor in tensors:
                tensor.fill_(5.0)

    class Together:
        group = Group()

    model = small(DualClipPPO, "MlpPolicy", scripted(), reuse=EWMA)
    monkeypatch.setattr(model, "_together", Together())
    model._setup_learn(N, None, False)
    assert all(bool((tensor == 5.0).all()) for tensor in model._average.state_dict().values())
    assert model._average.total_weight.tolist() == [5.0]


class Uncopied(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = th.nn.Parameter(th.zeros(self.made))
        Uncopied.made += 1

    made = 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reuse": {**EWMA, "ewma_decay": 1.0}}, "reuse['ewma_decay']=1.0 is not allowed"),
        ({"reuse": {**EWMA, "ewma_decay": -0.1}}, "reuse['ewma_decay']=-0.1 is not allowed"),
        ({"reuse": {**EWMA, "target": "gae"}}, "target is read with n_reused_rollouts at least 1 alone"),
        ({"reuse": {"ewma_decay": 0.9}}, "it must be None or have 'proximal': 'ewma', or n_reused_rollouts be at"),
        (
            {"n_reused_rollouts": 1, "reuse": {"proximal": "newest", "ewma_decay": 0.9}},
            "ewma_decay is read with proximal='ewma' alone",
        ),
        ({"reuse": EWMA, "kl_adaptive_lr": {}}, "kl_adaptive_lr={} is not allowed with reuse={'proximal': 'ewma'}"),
        ({"reuse": EWMA, "policy": Uncopied}, "is not allowed with policy=Uncopied: it cannot be copied (RuntimeError"),
    ],
)
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_where_it_cannot_hold(algorithm: Any, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"policy": "MlpPolicy", **kwargs}
    with pytest.raises(ValueError, match=re.escape(message)):
        small(algorithm, arguments.pop("policy"), "CartPole-v1", **arguments)


def test_no_update_ends_early_by_the_kl_from_the_average() -> None:
    with pytest.raises(ValueError, match=re.escape("target_kl=0.01 is not allowed with reuse={'proximal': 'ewma'}")):
        small(DualClipPPO, "MlpPolicy", "CartPole-v1", reuse=EWMA, target_kl=0.01)
    assert small(AdaptiveKLPPO, "MlpPolicy", "CartPole-v1", reuse=EWMA, target_kl=0.01).target_kl == 0.01


def test_without_it_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_ppo_ext.common.reusing.MovingAverage", None)
    model = small(DualClipPPO, "MlpPolicy", scripted(), n_reused_rollouts=1, reuse={"proximal": "newest"}).learn(N)
    assert model._average is None
    assert ROLLOUT * model.n_envs == N
