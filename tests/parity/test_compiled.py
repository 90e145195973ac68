"""What is compiled computes what the eager code computes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from torch import fx, nn

from sb3_ppo_ext import TRPO, DualClipPPO
from sb3_ppo_ext.common.compile import Run, cpu
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.rollout.data import PolicyInput
from tests.envs import BOX_ACTIONS
from tests.parity.compiled import (
    CASES,
    Extractor,
    agree_after_updates,
    agree_both_ways,
    agree_on_rollouts,
    make_model,
    same_batch,
    trained,
    trained_both_ways,
)

# With machine code, which takes seconds for each program. These have every kind of program: the actor, the evaluation
# of rollouts, the gradient steps of all losses and the Fisher product; with an image, gSDE and all coefficients; and
# sequences, unrolled.
COMPILED = ["box, everything clipped", "trpo, gsde, squashed, dict with an image", "memory"]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_is_eager(case: str) -> None:
    agree_both_ways(case)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("case", CASES)
def test_traced_is_eager(case: str) -> None:
    agree_both_ways(case)


@pytest.mark.parametrize(
    ("n_rows", "n_inputs", "dtype", "by_library"),
    [
        (1, 7, th.float32, False),
        (1, 7, th.float64, True),
        (1, 2000, th.float32, False),
        (8, 7, th.float32, False),
        (8, 200, th.float32, True),
    ],
)
def test_a_small_layer_needs_no_library(
    n_rows: int, n_inputs: int, dtype: th.dtype, by_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the actor of a few environments, where a call of the library takes longer than the product."""
    called: list[Any] = []

    def run(graph: fx.GraphModule, inputs: list[th.Tensor]) -> Run:
        called.extend(node.target for node in graph.graph.nodes)
        return lambda inputs: graph(*inputs)

    monkeypatch.setattr(cpu, "machine_code", run)
    monkeypatch.setattr(cpu, "is_mkl_slow", lambda: False)
    layer = nn.Linear(n_inputs, 5, dtype=dtype)
    x = th.randn(n_rows, n_inputs, dtype=dtype)
    program = Program(
        lambda fixed, batch, x: [nn.functional.linear(x, *fixed)], th.device("cpu"), what="a layer", announce=False
    )
    program.bind([layer.weight.detach(), layer.bias.detach()])
    th.testing.assert_close(program(x)[0], layer(x).detach())
    assert (th.ops.aten.addmm.default in called) == by_library


@pytest.mark.parametrize("name", CASES["box, everything clipped"][2])
def test_everything_is_clipped_in_the_case_of_that_name(name: str) -> None:
    """Each of its settings makes a difference."""
    algorithm, action_space, kwargs = CASES["box, everything clipped"]
    others = {key: value for key, value in kwargs.items() if key != name}
    models = [trained(algorithm, action_space, **settings) for settings in (kwargs, others)]
    assert max((p - q).abs().max().item() for p, q in zip(*(m.policy.parameters() for m in models), strict=True)) > 1e-3


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("algorithm", [DualClipPPO, TRPO])
def test_what_a_network_keeps_shares_or_changes(algorithm: Any) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": Extractor}, "verbose": 0}
    models = [make_model(algorithm, BOX_ACTIONS, torch_compile=compiled, **kwargs) for compiled in (False, True)]
    for model in models:
        th.manual_seed(0)
        extractor = model.policy.features_extractor
        for offset, scale, is_sorted in ((0.0, 1.0, False), (0.5, 1.0, False), (0.5, 2.0, False), (0.5, 2.0, True)):
            extractor.offset.fill_(offset)
            extractor.scale = scale
            extractor.order = th.arange(len(extractor.mean)) if is_sorted else extractor.order
            np.random.seed(0)  # noqa: NPY002  # the minibatches
            with same_batch():
                model.learn(128)
    eager, compiled = models
    agree_after_updates(eager, compiled, stops=False)
    agree_on_rollouts(compiled)
    assert eager.policy.features_extractor.mean.any()


@pytest.mark.usefixtures("without_compiler")
def test_what_is_replaced_is_seen() -> None:
    model = make_model(DualClipPPO, BOX_ACTIONS, torch_compile=True)
    model.learn(128)
    model.policy.mlp_extractor.policy_net[1] = th.nn.Sigmoid()  # which has no more to itself than Tanh
    agree_on_rollouts(model)
    parameters = th.nn.utils.parameters_to_vector(model.policy.parameters())
    act = model._acting_policy().act
    th.nn.utils.vector_to_parameters(2.0 * parameters.detach(), model.policy.parameters())  # by other memory
    obs = PolicyInput(obs_as_tensor(model.env.reset(), model.device))
    th.manual_seed(0)
    expected, _ = model._actor_critic().act(obs)
    th.manual_seed(0)
    th.testing.assert_close(act(obs)[0], expected)
    model.policy.optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="without amsgrad, maximize and weight_decay"):
        model.learn(128)


@pytest.mark.usefixtures("without_compiler")
def test_a_copy_of_a_model_compiles_for_itself() -> None:
    model = make_model(DualClipPPO, BOX_ACTIONS, torch_compile=True)
    model.learn(128)
    other = copy.deepcopy(model)
    for one in (model, other):
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        one.set_random_seed(0)
        one.learn(128)
    for p, q in zip(model.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(p, q)


@pytest.mark.slow
def test_saturated_actions() -> None:
    """Where the Jacobian of a squashed action is nearly zero, the last digits of tanh count."""
    algorithm, action_space, kwargs = CASES["trpo, gsde, squashed, dict with an image"]
    assert kwargs["policy_kwargs"]["log_std_init"] == 1.0
    model = make_model(algorithm, action_space, torch_compile=True, **kwargs)
    model.learn(128)
    assert np.quantile(np.abs(model.rollout_buffer.actions), 0.9) > 0.999
    log = model.logger.name_to_value
    before = log["train/policy_objective"] - log["train/actual_improvement"]
    assert before == pytest.approx(0.0, abs=1e-6)  # the mean of normalised advantages: all ratios are 1


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_loss_that_is_not_finite_makes_no_step_in_machine_code() -> None:
    """The flags of a compiler may say that there are no such numbers."""
    algorithm, action_space, kwargs = CASES["box, everything clipped"]
    model = make_model(algorithm, action_space, torch_compile=True, **kwargs)
    train = model.train
    for value in (math.nan, math.inf, 1e30):

        def train_with(value: float = value) -> None:
            model.rollout_buffer.returns[3] = value
            train()

        model.train = train_with
        before = [p.detach().clone() for p in model.policy.parameters()]
        with pytest.raises(NonFiniteError, match="value_loss="):
            model.learn(384)
        assert all(p.isfinite().all() for p in model.policy.parameters())
        assert all(state["exp_avg"].isfinite().all() for state in model.policy.optimizer.state.values())
        assert not all(map(th.equal, before, model.policy.parameters()))  # by the other minibatches


@pytest.mark.parametrize("case", ["box, everything clipped", "trpo"])
def test_the_compiler_for_gpus_takes_what_is_traced(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its way but its last part, which writes the kernels."""

    def compiled_in_part(graph: th.fx.GraphModule, inputs: list[th.Tensor]) -> Run:
        compiled = th.compile(graph, fullgraph=True, dynamic=False, backend="aot_eager")
        return th.no_grad()(lambda inputs: compiled(*inputs))

    monkeypatch.setattr(cpu, "machine_code", compiled_in_part)
    agree_both_ways(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager_on_cuda(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)  # three digits of a convolution, by default
    algorithm, action_space, kwargs = CASES[case]
    eager, compiled = trained_both_ways(algorithm, action_space, **{**kwargs, "device": "cuda"})
    agree_after_updates(eager, compiled, stops="target_kl" in kwargs)
    agree_on_rollouts(compiled)


@pytest.mark.usefixtures("without_compiler")
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
