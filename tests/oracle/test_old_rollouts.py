"""``n_reused_rollouts``: what an update learns from, and what it makes of the samples of older policies."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, ArrayVecEnv, DualClipPPO, TensorVecEnv
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.saving.checkpoint import resume, save_checkpoint
from sb3_ppo_ext.common.update import old_rollouts
from sb3_ppo_ext.common.update.objective import ActorCriticLoss
from tests.algorithms import PROXIMAL, ROLLOUT, assert_close_policies, assert_same_policy, have_moved, parameters, small
from tests.custom import EveryStepBuffer
from tests.envs import DICT, limited_walk, scripted
from tests.oracle.test_recompute_advantages import Keeps, OwnGet
from tests.oracle.test_targets import Rollout
from tests.oracle.test_vtrace import looped
from tests.parity.noise import Noise
from tests.tensor_envs import ShortPendulum

NEWEST = {"proximal": "newest"}
VTRACE = {"target": "vtrace"}
BOTH = {"proximal": "newest", "target": "vtrace", "max_importance_weight": 1.5, "rho_bar": 1.2, "c_bar": 0.9}
TINY_LSTM = {"lstm_hidden_size": 4}
KINDS = [None, NEWEST, VTRACE, BOTH]
FAST = {"learning_rate": 0.02}
OTHERS = ("observations", "actions", "rewards", "terminated", "truncated", "log_probs")
pytestmark = pytest.mark.filterwarnings("ignore:batch_size=")
N = 2 * ROLLOUT  # samples in a rollout of two environments


def masked_noise() -> Any:
    return DummyVecEnv([lambda: Noise(5, is_masked=True)] * 2)


def cart_poles() -> Any:
    """Which spend a step on each reset, that does not count."""
    return ArrayVecEnv(gym.make_vec("CartPole-v1", num_envs=2, max_episode_steps=7))


class Seen(Keeps):
    """What each rollout held, flat, as its buffer says; and what each update learnt from."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[RolloutSamples] = []
        self.updates: list[tuple[RolloutSamples, set[int]]] = []

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        buffer = self.locals["rollout_buffer"]
        samples = buffer.flat()
        self.rollouts.append(RolloutSamples(*(None if x is None else _cloned(x) for x in samples)))


def _cloned(part: Any) -> Any:
    return {key: x.clone() for key, x in part.items()} if isinstance(part, dict) else part.clone()


def trained(algorithm: Any, env: Any, n_updates: int, policy: str = "MlpPolicy", **kwargs: Any) -> tuple[Any, Seen]:
    """A model, and what it has seen."""
    model, seen = small(algorithm, policy, env, **{**FAST, **kwargs}), Seen()
    make_epoch = model._make_epoch

    def make_watched(step: Any, minibatches: Any, *args: Any) -> bool:
        assert model.policy.training
        cut = list(minibatches)
        rows = th.cat([some for _, some in cut])
        assert len(rows) == len(set(rows.tolist()))
        seen.updates.append((cut[0][0], set(rows.tolist())))
        goes_on: bool = make_epoch(step, cut, *args)
        return goes_on

    model._make_epoch = make_watched
    model.learn(n_updates * ROLLOUT * model.n_envs, callback=seen)
    return model, seen


@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_without_old_rollouts_nothing_of_it_is_done(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Rollouts", "kept"):
        monkeypatch.setattr(f"sb3_ppo_ext.common.reusing.{name}", None)
    model = small(algorithm, "MlpPolicy", scripted(), n_reused_rollouts=0).learn(2 * N)
    assert model._old_rollouts == ()
    assert "max_importance_weight" not in model.coefficients()


@pytest.mark.parametrize("reuse", KINDS)
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_the_first_update_is_as_ever_to_the_bit(algorithm: Any, reuse: Any) -> None:
    """There is no old rollout yet, and the newest is weighted by 1."""
    kwargs = {**FAST, "batch_size": 12, "clip_range_vf": 0.2}
    model = small(algorithm, "MlpPolicy", scripted(), n_reused_rollouts=2, reuse=reuse, **kwargs).learn(N)
    assert_same_policy(small(algorithm, "MlpPolicy", scripted(), **kwargs).learn(N), model)


@pytest.mark.parametrize(
    ("policy", "make_env", "kwargs"),
    [
        ("MlpPolicy", scripted, {}),
        ("MlpPolicy", scripted, {"torch_compile": True}),
        ("MultiInputPolicy", lambda: scripted(DICT), {"policy_kwargs": {"net_arch": [4]}}),
        ("MlpPolicy", masked_noise, {}),
        ("MlpPolicy", cart_poles, {"torch_compile": True}),
        ("MlpLstmPolicy", scripted, {"sequence_length": 4, "policy_kwargs": TINY_LSTM}),
        ("MlpPolicy", lambda: TensorVecEnv(ShortPendulum(2)), {}),
    ],
    ids=["rows", "compiled", "dict", "masks", "steps that do not count", "memory", "tensors"],
)
@pytest.mark.usefixtures("without_compiler")
def test_an_update_has_the_newest_rollout_and_those_before_it(policy: str, make_env: Any, kwargs: Any) -> None:
    """With all that was kept of them when they were collected, and no more than asked for."""
    model, seen = trained(AdaptiveKLPPO, make_env(), 4, policy, n_reused_rollouts=2, **kwargs)
    assert len(seen.rollouts) == 4
    assert len(model._old_rollouts) == 2
    of_updates = seen.updates[:: model.n_epochs]
    for i, (samples, rows) in enumerate(of_updates):
        expected = seen.rollouts[max(0, i - 2) : i + 1][::-1]
        n = sum(len(rollout.returns) for rollout in expected)
        assert rows == set(range(n // samples.length))
        assert samples.proximal_log_prob is None
        for name, part in samples._asdict().items():
            columns = [getattr(rollout, name) for rollout in expected]
            if part is None:
                assert columns == [None] * len(columns)
            elif isinstance(part, dict):
                for key in part:
                    assert th.equal(part[key][:n], th.cat([column[key] for column in columns]))
            else:
                whole = th.cat(columns)
                assert th.equal(part[: len(whole)], whole), name
    if policy == "MlpLstmPolicy":
        assert of_updates[2][0].states is not None
        assert of_updates[2][0].states.any()
    # A new training does not learn from an earlier one.
    before = len(seen.updates)
    model.learn(N, callback=seen)
    assert len(seen.updates[before][1]) == len(seen.rollouts[-1].returns) // seen.rollouts[-1].length


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_the_proximal_policy_is_the_newest(algorithm: Any, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of old samples is what SB3's own methods say, of values, log-probabilities and the Gaussians."""
    captured: list[Any] = []
    made = old_rollouts.Rollouts.__init__

    def watched(self: Any, newest: Any, old: Any, reuse: Any, actor_critic: Any, **kwargs: Any) -> None:
        assert not model.policy.training
        made(self, newest, old, reuse, actor_critic, **kwargs)
        samples = self._samples
        with th.no_grad():
            evaluation = actor_critic.evaluate_actions(samples.inputs, samples.actions)
            of_sb3 = None
            if policy == "MlpPolicy":
                of_sb3 = model.policy.evaluate_actions(samples.observations, samples.actions)[:2]
        captured.append((samples, evaluation, of_sb3))

    monkeypatch.setattr(old_rollouts.Rollouts, "__init__", watched)
    model = small(algorithm, policy, scripted(), n_reused_rollouts=1, reuse=NEWEST, **FAST)
    model.learn(3 * N)
    for samples, evaluation, of_sb3 in captured:
        th.testing.assert_close(samples.proximal_log_prob, evaluation.log_prob)
        th.testing.assert_close(samples.old_values, evaluation.values)
        if of_sb3 is not None:
            th.testing.assert_close(samples.old_values, of_sb3[0].flatten())
            th.testing.assert_close(samples.proximal_log_prob, of_sb3[1])
        if algorithm is AdaptiveKLPPO:
            th.testing.assert_close(samples.old_params, evaluation.params)
        assert th.equal(samples.proximal_log_prob[:N], samples.old_log_prob[:N])
    assert (captured[2][0].proximal_log_prob - captured[2][0].old_log_prob)[N:].abs().max() > 0.01


@pytest.mark.parametrize("reference", [{}, {"reference_policy": "initial", "reference_kl_coef": 0.5}])
def test_vtrace_by_a_plain_loop(reference: dict[str, Any]) -> None:
    """With SB3's values, log-probabilities and final observations; of the rewards less the penalties, if there are."""
    kwargs = {"n_reused_rollouts": 1, "reuse": BOTH, **reference}
    model, seen = small(DualClipPPO, "MlpPolicy", scripted(), **kwargs, **FAST), Seen()
    finals, lasts, buffers, found = [], [], [], []
    rollouts = model._rollouts

    def watched() -> Any:
        finals.append(dict(seen.final))
        lasts.append(model._last_obs.copy())
        buffers.append({name: getattr(model.rollout_buffer, name) for name in (*seen.values, *OTHERS, "penalties")})
        result = rollouts()
        if len(buffers) > 1:
            found.append((result._samples, expected()))
        return result

    def expected() -> Any:
        held = buffers[-2]

        def values(obs: Any) -> th.Tensor:
            return model.policy.predict_values(th.as_tensor(obs)).flatten().double()

        with th.no_grad():
            steps = [
                model.policy.evaluate_actions(th.as_tensor(obs), th.as_tensor(actions))
                for obs, actions in zip(held["observations"], held["actions"], strict=True)
            ]
            final_values = th.full((ROLLOUT, 2), th.nan, dtype=th.float64)
            for (step, i), obs in finals[-2].items():
                final_values[step, i] = values(obs[None])[0]
            rollout = Rollout(
                th.as_tensor(held["rewards"] - (held["penalties"] if reference else 0.0)).double(),
                th.stack([step[0].flatten() for step in steps]).double(),
                values(lasts[-2]),
                th.as_tensor(held["terminated"]),
                th.as_tensor(held["truncated"]),
                final_values,
            )
            log_ratios = th.stack([step[1] for step in steps]).double() - th.as_tensor(held["log_probs"])
        everything = th.ones(ROLLOUT, 2, dtype=th.bool)
        return looped(rollout, log_ratios, everything, 0.99, 0.95, 1.2, 0.9)

    model._rollouts = watched
    model.learn(3 * N, callback=seen)
    assert finals[0]
    assert len(found) == 2
    assert not reference or abs(buffers[1]["penalties"]).max() > 1e-3
    for samples, targets in found:
        advantages, returns = (target.T.flatten().float() for target in targets)
        th.testing.assert_close(samples.advantages[N:], advantages, atol=1e-5, rtol=1e-5)
        th.testing.assert_close(samples.returns[N:], returns, atol=1e-5, rtol=1e-5)
    assert (found[1][0].advantages[N:] - th.as_tensor(buffers[1]["advantages"]).T.flatten()).abs().max() > 0.01


def test_what_is_kept_does_not_change_with_what_comes_later() -> None:
    model = small(DualClipPPO, "MlpPolicy", scripted()).learn(N)
    obs = model._last_obs.copy()
    old = old_rollouts.kept(model.rollout_buffer, obs, old_rollouts.Reuse(target="vtrace"))
    before = old.last_obs.copy(), old.buffer.rewards.copy(), len(old.buffer.final_observations)
    obs += 1.0
    model.learn(N)
    assert np.array_equal(old.last_obs, before[0])
    assert np.array_equal(old.buffer.rewards, before[1])
    assert len(old.buffer.final_observations) == before[2] > 0
    assert old_rollouts.kept(model.rollout_buffer, obs, old_rollouts.Reuse()).last_obs is None


def test_the_share_of_truncated_weights_is_of_the_samples_that_count() -> None:
    """Of each minibatch: where prox / old is above the bound."""
    model = small(DualClipPPO, "MlpPolicy", scripted(), n_reused_rollouts=1, reuse=NEWEST).learn(N)
    loss = ActorCriticLoss(model.policy_loss, normalize_advantage=False)
    samples = model._rollouts()._samples.rows(slice(0, 5))
    shares = []
    for counts in (None, [True, True, True, False, True]):
        ratios = th.tensor([0.5, 1.0, 1.4, 1.6, 30.0])
        samples = samples._replace(
            proximal_log_prob=samples.old_log_prob + ratios.log(), mask=None if counts is None else th.tensor(counts)
        )
        numbers = {**model.coefficients(), "vf_coef": 0.5, "max_importance_weight": 1.5}
        shares.append(loss(model._actor_critic(), samples, numbers)[1]["truncated_weight_fraction"].item())
    assert shares == pytest.approx([2 / 5, 1 / 4])
    plain = loss(model._actor_critic(), samples._replace(proximal_log_prob=None), numbers)[1]
    assert "truncated_weight_fraction" not in plain


@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_old_rollouts_are_of_the_present_environments(algorithm: Any) -> None:
    """Others end them; the same ones, and others that go on where those were, do not."""
    model = small(algorithm, "MlpPolicy", scripted(), n_reused_rollouts=1).learn(N)
    (old,) = model._old_rollouts
    for env, force_reset in ((model.get_env(), True), (scripted(), False)):
        model.set_env(env, force_reset=force_reset)
        assert model._old_rollouts == (old,)
    model.set_env(scripted())
    assert model._old_rollouts == ()
    sizes: list[int] = []
    rollouts = model._rollouts

    def watched() -> Any:
        result = rollouts()
        sizes.append(result._n_samples)
        return result

    model._rollouts = watched
    model.learn(2 * N, reset_num_timesteps=False)
    assert sizes == [N, 2 * N]


@pytest.mark.parametrize("clip_range", [None, 0.1])
def test_the_penalised_loss_around_the_newest_policy(clip_range: float | None) -> None:
    """By its definition: w = min(prox / old, bound), and -w min(r A, clip(r) A) + beta KL(prox || new)."""
    model = small(AdaptiveKLPPO, "MlpPolicy", scripted(), clip_range=clip_range, n_reused_rollouts=1, reuse=NEWEST)
    model.learn(N)
    model.train = lambda: None
    model.learn(N, reset_num_timesteps=False)
    samples = model._rollouts()._samples
    evaluation = model._actor_critic().evaluate_actions(samples.inputs, samples.actions)
    numbers = {**model.coefficients(), "max_importance_weight": 1.001}
    loss, _ = model.policy_loss(evaluation, samples, numbers)
    weights = (samples.proximal_log_prob - samples.old_log_prob).exp().clamp(max=1.001)
    assert 0 < (weights == 1.001).sum() < len(weights)
    ratio = (evaluation.log_prob - samples.proximal_log_prob).exp()
    gains = ratio * samples.advantages
    if clip_range is not None:
        gains = th.minimum(gains, ratio.clamp(0.9, 1.1) * samples.advantages)
    expected = (model.kl_coef * gaussian_kl(samples.old_params, evaluation.params) - weights * gains).mean()
    th.testing.assert_close(loss, expected)


def gaussian_kl(old: th.Tensor, new: th.Tensor) -> th.Tensor:
    of_old, of_new = (th.distributions.Normal(*params.chunk(2, dim=1)) for params in (old, new))
    return th.distributions.kl_divergence(of_old, of_new).sum(dim=1)


@pytest.mark.parametrize(
    ("algorithm", "policy", "kwargs"),
    [
        (DualClipPPO, "MlpPolicy", {"reuse": BOTH}),
        (DualClipPPO, "MlpPolicy", {"reuse": NEWEST, "batch_size": 12, "target_kl": 0.5, "rollback": True}),
        (AdaptiveKLPPO, "MlpPolicy", {"reuse": NEWEST, "clip_range": 0.2, "kl_adaptive_lr": {"maximum": 0.1}}),
        (
            AdaptiveKLPPO,
            "MlpLstmPolicy",
            {"reuse": NEWEST, "batch_size": 12, "sequence_length": 4, "n_epochs": 1, "policy_kwargs": TINY_LSTM},
        ),
    ],
    ids=["vtrace", "uneven minibatches", "everything adaptive", "memory"],
)
@pytest.mark.usefixtures("without_compiler")
def test_compiled_equals_eager_with_one_program(
    algorithm: Any, policy: str, kwargs: dict[str, Any], programs: list[str]
) -> None:
    eager, compiled = (
        small(algorithm, policy, scripted(), n_reused_rollouts=2, torch_compile=of, **{**FAST, **kwargs})
        for of in (False, True)
    )
    before = parameters(eager)
    for model in (eager, compiled):
        model.set_random_seed(0)
        model.learn(4 * N)
    assert have_moved(eager, before)
    assert_close_policies(eager, compiled, atol=1e-4)
    assert programs.count("the gradient step") == 1


@pytest.mark.parametrize("reuse", [None, BOTH])
def test_a_checkpoint_has_the_old_rollouts_and_a_saved_model_none(reuse: Any, tmp_path: Any) -> None:
    def made() -> Any:
        return make_vec_env(limited_walk, 2, seed=0)

    model = small(DualClipPPO, "MlpPolicy", made(), n_reused_rollouts=2, reuse=reuse, **FAST).learn(2 * N)
    save_checkpoint(model, tmp_path / "checkpoint")
    model.save(tmp_path / "plain")
    model.learn(2 * N, reset_num_timesteps=False)
    resumed = resume(DualClipPPO, tmp_path / "checkpoint", made(), device="cpu")
    assert len(resumed._old_rollouts) == 2
    assert_same_policy(model, resumed.learn(2 * N, reset_num_timesteps=False))
    plain = DualClipPPO.load(tmp_path / "plain", made(), device="cpu")
    assert (plain.n_reused_rollouts, plain.reuse, plain._old_rollouts) == (2, reuse, ())
    assert have_moved(plain.learn(N), parameters(model))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_reused_rollouts": -1}, "n_reused_rollouts=-1 is not allowed"),
        ({"n_reused_rollouts": 1.5}, "n_reused_rollouts=1.5 is not allowed"),
        ({"n_reused_rollouts": 0, "reuse": NEWEST}, "is not allowed with n_reused_rollouts=0, which learns from"),
        ({"reuse": "vtrace"}, "reuse='vtrace' is not allowed: it must be None, or a dict of target, proximal, max_imp"),
        ({"reuse": {"targets": "gae"}}, "a key of reuse='targets' is not allowed"),
        ({"reuse": {"target": "td"}}, "reuse['target']='td' is not allowed: it must be one of 'gae', 'vtrace'"),
        ({"reuse": {"proximal": "oldest"}}, "reuse['proximal']='oldest' is not allowed"),
        ({"reuse": {**NEWEST, "max_importance_weight": 0}}, "reuse['max_importance_weight']=0 is not allowed"),
        ({"reuse": {**VTRACE, "rho_bar": 0.5}}, "reuse['c_bar']=1.0 is not allowed"),
        ({"reuse": {"max_importance_weight": 3.0}}, "max_importance_weight is read with proximal='newest' or 'ewma'"),
        ({"reuse": {"c_bar": 0.5}}, "c_bar is read with target='vtrace' alone"),
        ({"recompute_advantages": True}, "recompute_advantages=True is not allowed with n_reused_rollouts=1"),
        ({"kl_adaptive_lr": {}}, "kl_adaptive_lr={} is not allowed with n_reused_rollouts=1"),
        ({"policy": "MlpLstmPolicy", "reuse": VTRACE}, "is not allowed with policy=MlpLstmPolicy"),
        ({"rollout_buffer_class": EveryStepBuffer}, "n_reused_rollouts=1 is not allowed with rollout_buffer_class=Ev"),
        ({"rollout_buffer_class": OwnGet}, "n_reused_rollouts=1 is not allowed with rollout_buffer_class=OwnGet"),
    ],
)
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_where_it_cannot_hold(algorithm: Any, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"policy": "MlpPolicy", "n_reused_rollouts": 1, **kwargs}
    with pytest.raises(ValueError, match=re.escape(message)):
        small(algorithm, arguments.pop("policy"), "CartPole-v1", **arguments)
    with pytest.raises(TypeError, match="n_reused_rollouts"):
        small(TRPO, "MlpPolicy", "CartPole-v1", n_reused_rollouts=1)
