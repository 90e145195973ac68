"""Policies with a memory: what is computed of sequences is what one would compute step by step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic
from sb3_ppo_ext.common.rollout.data import PolicyInput, RolloutSamples
from sb3_ppo_ext.common.update.critic import critic_loss
from sb3_ppo_ext.common.update.fisher import fisher_vector_product
from sb3_ppo_ext.common.update.objective import ActorCriticLoss
from sb3_ppo_ext.common.update.scores import score_statistics
from sb3_ppo_ext.common.update.step import reached
from tests.algorithms import small
from tests.envs import scripted
from tests.pairwise import pairwise

SMALL_MEMORY = {"lstm_hidden_size": 4}
SHARED = {"shared_lstm": True, "enable_critic_lstm": False}
NONE_OF_THE_CRITIC = {"enable_critic_lstm": False}
TWO_ACTIONS = spaces.Discrete(2)


def model_of(algorithm: Any = DualClipPPO, sequence_length: int = 4, n_envs: int = 2, **kwargs: Any) -> Any:
    policy_kwargs = {**SMALL_MEMORY, **kwargs.pop("policy_kwargs", {})}
    env = scripted(action_space=TWO_ACTIONS, n_envs=n_envs)  # whose episodes have 2 to 4 steps
    return small(
        algorithm, "MlpLstmPolicy", env, policy_kwargs=policy_kwargs, sequence_length=sequence_length, **kwargs
    )


def collected(model: Any) -> RolloutSamples:
    """The samples of a rollout that the model, as it is, has collected and not learnt from."""
    model.train = lambda: None
    model.learn(1)
    model.policy.set_training_mode(False)
    samples: RolloutSamples = model.rollout_buffer.flat()
    return samples


def by_hand(policy: Any, samples: RolloutSamples) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Logits, values and state after each step, of a policy with separate LSTMs of one layer and Discrete actions: by
    torch's cells, one step at a time.
    """
    assert samples.states is not None
    assert samples.episode_starts is not None
    assert isinstance(samples.observations, th.Tensor)
    size = policy.lstm_actor.hidden_size
    cells = []
    for lstm in (policy.lstm_actor, policy.lstm_critic):
        cells.append([getattr(lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")])
    logits, values, states = [], [], []
    for i in range(len(samples.states)):
        state = samples.states[i].split(size)
        now = [[part.unsqueeze(0) for part in state[:2]], [part.unsqueeze(0) for part in state[2:]]]
        for t in range(i * samples.length, (i + 1) * samples.length):
            if samples.episode_starts[t]:
                now = [[th.zeros(1, size), th.zeros(1, size)] for _ in cells]
            x = samples.observations[t : t + 1]
            now = [list(th.lstm_cell(x, tuple(hc), *weights)) for hc, weights in zip(now, cells, strict=True)]
            logits.append(policy.action_net(policy.mlp_extractor.policy_net(now[0][0])))
            values.append(policy.value_net(policy.mlp_extractor.value_net(now[1][0])))
            states.append(th.cat([part for hc in now for part in hc], dim=1))
    return th.cat(logits), th.cat(values).flatten(), th.cat(states)


def test_one_sequence_is_a_network_that_was_unrolled_by_hand() -> None:
    model = model_of(sequence_length=16, n_steps=16, batch_size=16, seed=1)
    policy = model.policy
    with th.no_grad():
        for parameter in policy.action_net.parameters():  # SB3 begins with almost none
            parameter.normal_()
    samples = collected(model)
    assert samples.episode_starts is not None
    assert samples.episode_starts.view(2, 16)[:, 1:].any(), "an episode should begin in the middle"
    evaluation = direct_actor_critic(policy).evaluate_actions(samples.inputs, samples.actions)
    logits, values, _ = by_hand(policy, samples)
    log_prob = logits.log_softmax(dim=1).gather(1, samples.actions.long()).flatten()
    assert th.allclose(evaluation.log_prob, log_prob, atol=1e-6)
    assert th.allclose(evaluation.values, values, atol=1e-6)

    weights = th.randn(2, len(values))
    parameters = list(policy.parameters())
    for for_program in (False, True):
        evaluation = direct_actor_critic(policy, for_program=for_program).evaluate_actions(
            samples.inputs, samples.actions
        )
        ours = th.autograd.grad((weights * th.stack((evaluation.log_prob, evaluation.values))).sum(), parameters)
        theirs = th.autograd.grad(
            (weights * th.stack((log_prob, values))).sum(), parameters, retain_graph=not for_program
        )
        for our, their in zip(ours, theirs, strict=True):
            assert th.allclose(our, their, atol=1e-5)


def test_states_are_those_before_each_sequence_and_the_last_one_goes_on() -> None:
    model = model_of(n_envs=2)
    first = collected(model)
    assert first.states is not None
    _, _, states = by_hand(model.policy, first)
    of_envs = states.view(2, 4, 4, -1)  # environments, sequences, steps
    kept = first.states.view(2, 4, -1)
    assert th.allclose(kept[:, 1:], of_envs[:, :-1, -1], atol=1e-6)
    assert np.allclose(model._last_state, of_envs[:, -1, -1].detach(), atol=1e-6)
    before = model._last_state.copy()
    model.learn(1, reset_num_timesteps=False)
    assert np.array_equal(model.rollout_buffer.states[0], before)


@pytest.mark.parametrize(
    ("policy_kwargs", "rnn_type", "algorithm"),
    pairwise([{}, SHARED, NONE_OF_THE_CRITIC, {"n_lstm_layers": 2}], ["lstm", "gru"], [DualClipPPO, TRPO]),
)
def test_cutting_a_rollout_changes_no_value_and_no_probability(
    policy_kwargs: dict[str, Any], rnn_type: str, algorithm: Any
) -> None:
    model = model_of(algorithm, policy_kwargs={**policy_kwargs, "rnn_type": rnn_type})
    samples = collected(model)
    actor_critic = direct_actor_critic(model.policy)
    assert samples.states is not None
    assert samples.length == 4
    whole = samples._replace(states=samples.states[::4])
    assert whole.length == 16
    for cut in (samples, whole):
        evaluation = actor_critic.evaluate_actions(cut.inputs, cut.actions)
        assert th.allclose(evaluation.values, samples.old_values, atol=1e-6)
        assert th.allclose(evaluation.log_prob, samples.old_log_prob, atol=1e-6)
        assert th.allclose(actor_critic.params(cut.inputs), samples.old_params, atol=1e-6)
        assert th.allclose(actor_critic.values(cut.inputs), samples.old_values, atol=1e-6)


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_without_recurrent_weights_only_the_present_counts(rnn_type: str) -> None:
    """Closed gates: what an LSTM remembers is multiplied by 0, and a GRU's output is its candidate alone."""
    model = model_of(policy_kwargs={"rnn_type": rnn_type})
    size = 4
    closed = slice(size, 2 * size)  # the forget gate of an LSTM, the update gate of a GRU
    with th.no_grad():
        for rnn in (model.policy.lstm_actor, model.policy.lstm_critic):
            rnn.weight_hh_l0.zero_()
            rnn.weight_ih_l0[closed] = 0.0
            rnn.bias_ih_l0[closed] = -200.0
    samples = collected(model)
    actor_critic = direct_actor_critic(model.policy)
    n = len(samples.returns)
    alone = PolicyInput(samples.observations, None, th.randn(n, actor_critic.n_state), th.zeros(n))
    assert th.allclose(actor_critic.params(alone), samples.old_params, atol=1e-6)
    assert th.allclose(actor_critic.values(alone), samples.old_values, atol=1e-6)


def test_the_values_do_not_reach_layers_that_the_critic_shares() -> None:
    model = model_of(policy_kwargs=SHARED)
    samples = collected(model)
    actor_critic = direct_actor_critic(model.policy)
    evaluated = actor_critic.evaluate_actions(samples.inputs, samples.actions).values
    for values in (actor_critic.values(samples.inputs), evaluated):
        assert reached(values, model.policy.lstm_actor.parameters()) == []
        assert reached(values, model.policy.value_net.parameters()) == [*model.policy.value_net.parameters()]


def test_minibatches_are_of_whole_sequences_and_each_comes_once() -> None:
    model = model_of(n_steps=16, batch_size=8)
    samples = collected(model)
    assert samples.states is not None
    sequences = samples.observations.view(8, 4, 4)
    seen = []
    for minibatch in model.rollout_buffer.get(8):
        assert minibatch.length == 4
        assert len(minibatch.returns) == 8
        for obs, state in zip(minibatch.observations.view(2, 4, 4), minibatch.states, strict=True):
            (number,) = (i for i in range(8) if th.equal(sequences[i], obs))
            assert th.equal(samples.states[number], state)
            seen.append(number)
    assert sorted(seen) == list(range(8))


def test_fisher_products_are_those_of_the_explicit_matrix() -> None:
    model = model_of(
        TRPO, n_steps=8, batch_size=8, n_envs=1, policy_kwargs={"lstm_hidden_size": 2, "net_arch": []}, seed=3
    )
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.normal_(std=0.7)
    samples = collected(model)
    actor_critic = direct_actor_critic(model.policy)
    parameters = [*model.policy.lstm_actor.parameters(), *model.policy.action_net.parameters()]
    logits, _, _ = by_hand(model.policy, samples)
    n_parameters = sum(p.numel() for p in parameters)
    fisher = th.zeros(n_parameters, n_parameters)
    for row in logits:
        jacobian = th.stack(
            [th.cat([g.flatten() for g in th.autograd.grad(x, parameters, retain_graph=True)]) for x in row]
        )
        p = row.softmax(dim=0).detach()
        fisher += jacobian.t() @ (p.diag() - p.outer(p)) @ jacobian / len(logits)
    v = th.randn(n_parameters)
    for chunks in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        product = fisher_vector_product(
            actor_critic, actor_critic.family, samples.inputs, parameters, chunks, damping=0.25
        )
        assert th.allclose(product(v), fisher @ v + 0.25 * v, atol=1e-5)


def test_parameters_of_distributions_do_not_come_from_layers_that_cudnn_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fisher products differentiate them twice, which is an error there; on the CPU it is not."""
    model = model_of(TRPO)
    samples = collected(model)
    monkeypatch.setattr(nn.LSTM, "forward", None)
    params = direct_actor_critic(model.policy).params(samples.inputs)
    assert th.allclose(params, samples.old_params, atol=1e-6)


def test_the_kl_divergence_of_an_update_is_that_of_the_distributions_by_hand() -> None:
    model = model_of(AdaptiveKLPPO, n_envs=2, learning_rate=0.05, batch_size=16)
    model.learn(32)
    samples = model.rollout_buffer.flat()
    logits, _, _ = by_hand(model.policy, samples)
    old, new = samples.old_params.log_softmax(dim=1), logits.log_softmax(dim=1)
    expected = (old.exp() * (old - new)).sum(dim=1).mean().item()
    assert model.logger.name_to_value["train/kl"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4


@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
def test_sequences_that_fill_a_minibatch_change_nothing(algorithm: Any) -> None:
    model = model_of(algorithm, clip_range_vf=0.1, ent_coef=0.1)
    samples = collected(model)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))  # so that ratios are not 1
    loss = ActorCriticLoss(model.policy_loss, normalize_advantage=True)
    coefficients = {**model.coefficients(), "vf_coef": 0.5}
    rows, parameters = th.tensor([5, 2, 7]), list(model.policy.parameters())
    results = []
    for minibatch in (samples.rows(rows), samples.padded(rows, 5)):
        total, statistics = loss(direct_actor_critic(model.policy), minibatch, coefficients)
        gradients = th.autograd.grad(total, parameters)
        results.append([total, *gradients, *statistics.values()])
    for unfilled, filled in zip(*results, strict=True):
        assert th.allclose(unfilled, filled, atol=1e-6)


@pytest.mark.parametrize("sequence_length", [4, 64])
def test_padding_counts_in_no_mean_of_reinforce(sequence_length: int) -> None:
    """The episodes are not multiples of the length, and one environment waits for the other."""
    model = model_of(
        REINFORCE, sequence_length, n_envs=2, episodes_per_env=2, batch_size=64, ent_coef=0.1, max_grad_norm=1e9
    )
    samples = collected(model)
    assert samples.mask is not None
    assert not samples.mask.all()
    assert samples.mask.sum() == len(model.rollout_buffer.episode_index().step)
    del model.train
    actor_critic = direct_actor_critic(model.policy)
    logits, values, _ = by_hand(model.policy, samples)
    log_probs = logits.log_softmax(dim=1)
    counts = samples.mask
    chosen = log_probs.gather(1, samples.actions.long()).flatten()
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    advantages = samples.returns - samples.old_values
    loss = -((chosen * advantages.detach())[counts].sum() + 0.1 * entropy[counts].sum()) / 4
    parameters = [p for p in model.policy.parameters() if p.requires_grad]
    expected = th.autograd.grad(loss, parameters, materialize_grads=True)
    value_loss = (values - samples.returns)[counts].square().mean()
    assert critic_loss(actor_critic, samples, {})[0].item() == pytest.approx(value_loss.item(), rel=1e-4)
    gradients: list[th.Tensor] = []
    model._fit_critic = lambda *_: gradients.extend(
        th.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
    )
    model.train()
    for gradient, theirs in zip(gradients, expected, strict=True):
        assert th.allclose(gradient, theirs, atol=1e-5)
    entropy_loss = -entropy[counts].mean().item()
    assert model.logger.name_to_value["train/entropy_loss"] == pytest.approx(entropy_loss, rel=1e-4)


@pytest.mark.parametrize("sequence_length", [4, 16])
def test_scores_of_episodes_are_those_by_hand(sequence_length: int) -> None:
    """Those that the variance-optimal baseline of REINFORCE is made of: an episode is in several sequences, and others
    are in these too."""
    model = model_of(REINFORCE, sequence_length, episodes_per_env=2, batch_size=16, baseline="optimal")
    samples = collected(model)
    assert samples.mask is not None
    index = model.rollout_buffer.episode_index()
    seen: list[tuple[th.Tensor, th.Tensor]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(score_statistics(*args, **kwargs))
        return seen[-1]

    with mock.patch("sb3_ppo_ext.reinforce.score_statistics", noted):
        model._weights(direct_actor_critic(model.policy), samples, index)
    log_probs = by_hand(model.policy, samples)[0].log_softmax(dim=1).gather(1, samples.actions.long()).flatten()
    counted, returns = log_probs[samples.mask], samples.returns[samples.mask]
    parameters = [*model.policy.parameters()]
    for i in range(4):
        is_of_episode = index.episode == i
        score, weighted = (
            th.cat(
                [g.flatten() for g in th.autograd.grad(x.sum(), parameters, retain_graph=True, materialize_grads=True)]
            )
            for x in (counted[is_of_episode], (counted * returns)[is_of_episode])
        )
        assert seen[0][0][i].item() == pytest.approx(score.dot(weighted).item(), rel=1e-3, abs=1e-5)
        assert seen[0][1][i].item() == pytest.approx(score.dot(score).item(), rel=1e-3)
