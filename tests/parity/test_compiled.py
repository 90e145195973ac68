"""What is compiled computes what the eager code computes, and one program serves all updates."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import Run, cpu, cuda
from sb3_ppo_ext.common.compile import program as compiling
from sb3_ppo_ext.common.compile.policy_programs import CompiledActor
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.compile.step import CompiledStep
from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.rollout.data import PolicyInput
from tests.envs import BOX, DICT, IMAGE, ScriptedEnv
from tests.parity.smooth import SmoothCNN, SmoothCombined

TORQUES = spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "seed": 0, "device": "cpu"}


class Extractor(BaseFeaturesExtractor):
    """
    Has what networks may have: a tensor that is neither a parameter nor a buffer, a parameter of two layers, a buffer
    that is written into, one that is no float, and a number.
    """

    is_pure = True

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=4)
        n = observation_space.shape[0]
        self.first, self.second = th.nn.Linear(n, 4), th.nn.Linear(n, 4)
        self.second.weight = self.first.weight
        self.offset = th.zeros(n)
        self.scale = 1.0
        self.mean: th.Tensor
        self.order: th.Tensor
        self.register_buffer("mean", th.zeros(n))
        self.register_buffer("order", th.arange(n - 1, -1, -1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        x = self.scale * observations[:, self.order] + self.offset
        if self.training:
            self.mean.lerp_(x.mean(dim=0), 0.1)
        x = x - self.mean
        return self.first(x).relu() * self.second(x).sigmoid()


CASES: dict[str, tuple[Any, spaces.Space, dict[str, Any]]] = {
    "box, everything clipped": (
        DualClipPPO,
        TORQUES,
        {
            "n_epochs": 3,
            "learning_rate": "lin_1e-2",
            "policy_kwargs": {"critic_learning_rate": "lin_2e-2"},
            "clip_range": "lin_0.3",
            "clip_range_high": 0.25,
            "clip_range_vf": "lin_0.6",
            "dual_clip": 1.31,
            "ent_coef": "lin_0.1",
            "target_kl": 0.01,
        },
    ),
    "multi-discrete, an extractor of one's own": (
        AdaptiveKLPPO,
        spaces.MultiDiscrete([3, 2]),
        {
            "n_epochs": 3,
            "learning_rate": 1e-2,
            "ent_coef": 0.1,
            "policy_kwargs": {"features_extractor_class": Extractor},
        },
    ),
    "trpo, gsde, squashed, dict with an image": (
        TRPO,
        TORQUES,
        {
            "obs_space": DICT,
            "use_sde": True,
            "n_critic_updates": 2,
            "policy_kwargs": {"squash_output": True, "log_std_init": 1.0, "features_extractor_class": SmoothCombined},
        },
    ),
    "reinforce": (REINFORCE, spaces.MultiBinary(3), {"baseline": "value", "n_critic_updates": 2}),
    "discrete": (DualClipPPO, spaces.Discrete(3), {"dual_clip": None}),
    "gsde": (DualClipPPO, TORQUES, {"use_sde": True}),
    "multi-binary, clipped": (
        AdaptiveKLPPO,
        spaces.MultiBinary(3),
        {"clip_range": 0.05, "learning_rate": 1e-2, "n_epochs": 2},
    ),
    "trpo": (TRPO, spaces.Discrete(3), {"n_critic_updates": 2}),
    "reinforce, box": (REINFORCE, TORQUES, {"baseline": "value", "n_critic_updates": 2}),
    "dict with an image": (
        DualClipPPO,
        spaces.Discrete(3),
        {"obs_space": DICT, "policy_kwargs": {"features_extractor_class": SmoothCombined}},
    ),
    "reinforce, images": (
        REINFORCE,
        spaces.Discrete(3),
        {
            "policy": "CnnPolicy",
            "obs_space": IMAGE,
            "baseline": "value",
            "n_critic_updates": 2,
            "policy_kwargs": {"features_extractor_class": SmoothCNN},
        },
    ),
}
# With machine code, that is: to make it takes seconds a program, and these four have all spaces and kinds of programs.
COMPILED = list(CASES)[:4]


def make_model(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> Any:
    obs_space = kwargs.pop("obs_space", BOX)
    env = make_vec_env(lambda: ScriptedEnv(obs_space, action_space), n_envs=2, seed=0)
    policy = kwargs.pop("policy", "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy")
    if issubclass(algorithm, (DualClipPPO, AdaptiveKLPPO)):
        kwargs.setdefault("n_epochs", 1)
    settings = {**SMALL, **kwargs}
    if algorithm is REINFORCE:
        del settings["n_steps"]
    return algorithm(policy, env, **settings)


traced = pytest.mark.usefixtures("without_compiler")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled, as it is."""
    made: list[str] = []
    built = Program._built

    def noted(self: Program, *args: Any) -> Run:
        made.append(self._what)
        return built(self, *args)

    monkeypatch.setattr(Program, "_built", noted)
    return made


def trained(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> Any:
    model = make_model(algorithm, action_space, **kwargs)
    np.random.seed(0)  # noqa: NPY002  # the minibatches
    th.manual_seed(0)
    model.set_random_seed(0)
    # Two updates of three: moments and schedules have moved, and no clip range is 0 yet, which is all kink
    return model.learn(384, callback=lambda variables, _: variables["self"].num_timesteps < 257)


def trained_both_ways(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> list[Any]:
    return [trained(algorithm, action_space, torch_compile=compiled, **kwargs) for compiled in (False, True)]


@contextlib.contextmanager
def same_batch() -> Iterator[None]:
    """Actions that differ in the last bit are another batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledActor, "act", lambda self, obs: self._module._function.__self__.act(obs))
        yield


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_is_eager(case: str) -> None:
    agree_both_ways(case)


@traced
@pytest.mark.parametrize("case", CASES)
def test_traced_is_eager(case: str) -> None:
    agree_both_ways(case)


def agree_both_ways(case: str) -> None:
    algorithm, action_space, kwargs = CASES[case]
    with same_batch():
        eager, compiled = trained_both_ways(algorithm, action_space, **kwargs)
    agree_after_updates(eager, compiled, stops="target_kl" in kwargs)
    agree_on_rollouts(compiled)


@pytest.mark.parametrize("name", CASES["box, everything clipped"][2])
def test_everything_is_clipped_in_the_case_of_that_name(name: str) -> None:
    """Each of its settings makes a difference."""
    algorithm, action_space, kwargs = CASES["box, everything clipped"]
    others = {key: value for key, value in kwargs.items() if key != name}
    models = [trained(algorithm, action_space, **settings) for settings in (kwargs, others)]
    assert max((p - q).abs().max().item() for p, q in zip(*(m.policy.parameters() for m in models), strict=True)) > 1e-3


def agree_after_updates(eager: Any, compiled: Any, *, stops: bool) -> None:
    assert eager._n_updates == compiled._n_updates
    assert (eager._n_updates < 2 * getattr(eager, "n_epochs", 1)) == stops
    for p, q in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        assert (p - q).abs().max().item() <= 1e-5
        state, compiled_state = eager.policy.optimizer.state.get(p), compiled.policy.optimizer.state.get(q)
        assert bool(state) == bool(compiled_state)
        if state:
            assert state["step"].item() == compiled_state["step"].item()
            th.testing.assert_close(state["exp_avg"], compiled_state["exp_avg"], atol=1e-5, rtol=1e-3)
    for p, q in zip(eager.policy.buffers(), compiled.policy.buffers(), strict=True):
        th.testing.assert_close(p, q)
    theirs, ours = eager.logger.name_to_value, compiled.logger.name_to_value
    assert theirs.keys() == ours.keys()
    for name in theirs:
        if name.startswith("train/") and isinstance(theirs[name], float):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def agree_on_rollouts(model: Any) -> None:
    """Actions, from the same random numbers, and what is evaluated of them."""
    eager = model._actor_critic()
    model.policy.set_training_mode(False)
    compiled = model._acting_policy()
    obs = PolicyInput(obs_as_tensor(model.env.reset(), model.device))
    results = []
    for function in (eager.act, compiled.act):
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
        evaluation, ours = eager.evaluate_actions(*batch), compiled.evaluate_actions(*batch)
    th.testing.assert_close(ours.values, evaluation.values, atol=1e-5, rtol=1e-4)
    th.testing.assert_close(ours.log_prob, evaluation.log_prob, atol=1e-4, rtol=1e-4)
    th.testing.assert_close(ours.params, evaluation.params, atol=1e-5, rtol=1e-4)


@traced
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


def test_a_later_run_finds_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where what it finds is not whole, or is of another network."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    package = th._inductor.aoti_compile_and_package
    packages: dict[str, bytes] = {}

    def noted(program: Any, *, package_path: str) -> str:
        """The compiler, which takes its time only once for each program."""
        path = Path(package_path)
        compiled.append(path.name)
        if path.name in packages:
            path.write_bytes(packages[path.name])
        else:
            package(program, package_path=package_path)
            packages[path.name] = path.read_bytes()
        return package_path

    monkeypatch.setattr(th._inductor, "aoti_compile_and_package", noted)

    def doubled(width: int) -> list[float]:
        program = Program(lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="", announce=False)
        program.bind([th.ones(width)])
        return program(th.ones(width))[0].tolist()

    assert doubled(2) == doubled(2) == [3.0, 3.0]
    assert len(compiled) == 1
    assert doubled(3) == [3.0, 3.0, 3.0]
    assert len(compiled) == len(set(compiled)) == 2
    files = list(tmp_path.glob("sb3_ppo_ext/*"))
    assert {file.name for file in files} == set(compiled)
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2  # in the machine code, which would be run
        for damaged in (whole[:1000], b"", whole[:middle] + bytes(99) + whole[middle + 99 :]):
            file.write_bytes(damaged)
            n_compiled = len(compiled)
            assert doubled(2) == [3.0, 3.0]
            assert doubled(3) == [3.0, 3.0, 3.0]
            assert compiled[n_compiled:] == [file.name]


@traced
def test_what_is_given_in_another_layout_is_not_misread() -> None:
    program = Program(lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="", announce=False)
    program.bind([th.ones(4)])
    x = th.arange(12.0).view(3, 4)
    for given in (x, x[:2], x.double(), x.t().contiguous().t()):
        th.testing.assert_close(program(given), [1.0 + 2.0 * given])


@traced
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


@traced
def test_minibatches_of_all_sizes_are_one_program(programs: list[str]) -> None:
    """The first rollout is one minibatch, of 4 samples; the second has 33, in two of 32 and 1; each is padded to 32."""
    script = ((4, True, False), (33, True, False))
    models: list[Any] = []
    for compiled in (False, True):
        env = make_vec_env(lambda: ScriptedEnv(BOX, TORQUES, script), seed=0)
        kwargs: dict[str, Any] = {"baseline": "value", "episodes_per_env": 1, "batch_size": 32, "n_critic_updates": 2}
        model = REINFORCE("MlpPolicy", env, seed=0, device="cpu", torch_compile=compiled, **kwargs)
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        models.append(model.learn(37))
    assert programs == ["the actor", "the evaluation of rollouts", "the gradient step"]
    agree_after_updates(*models, stops=False)


@traced
@pytest.mark.parametrize("algorithm", [DualClipPPO, TRPO])
def test_what_a_network_keeps_shares_or_changes(algorithm: Any) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": Extractor}, "verbose": 0}
    models = [make_model(algorithm, TORQUES, torch_compile=compiled, **kwargs) for compiled in (False, True)]
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


@traced
def test_what_is_replaced_is_seen() -> None:
    model = make_model(DualClipPPO, TORQUES, torch_compile=True)
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


@traced
def test_a_copy_of_a_model_compiles_for_itself() -> None:
    model = make_model(DualClipPPO, TORQUES, torch_compile=True)
    model.learn(128)
    other = copy.deepcopy(model)
    for one in (model, other):
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        one.set_random_seed(0)
        one.learn(128)
    for p, q in zip(model.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(p, q)


def test_saturated_actions() -> None:
    """Where the Jacobian of a squashed action is nearly zero, the last digits of tanh count."""
    algorithm, action_space, kwargs = CASES[COMPILED[2]]
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
    algorithm, action_space, kwargs = CASES[COMPILED[0]]
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


class Refused(BaseFeaturesExtractor):
    """:param how: what it does that cannot be compiled"""

    is_pure = True

    def __init__(self, observation_space: Any, how: str) -> None:
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.how = how
        self.weight = th.nn.Parameter(th.ones(()))
        self.mean: th.Tensor
        self.register_buffer("mean", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        if self.how == "if":
            return x * self.weight if x.sum() > 0 else -x * self.weight
        self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return (x - self.mean) * self.weight


@traced
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("if", "the same ones for all values of these"),
        ("replaced", "mean is replaced by another tensor"),
    ],
)
def test_a_network_that_cannot_be_compiled_is_refused_before_training(how: str, message: str) -> None:
    env = make_vec_env(lambda: ScriptedEnv(BOX, TORQUES, ((9, True, False),)), seed=0)
    policy_kwargs: dict[str, Any] = {
        "features_extractor_class": Refused,
        "features_extractor_kwargs": {"how": how},
        "share_features_extractor": False,
    }
    model = REINFORCE("MlpPolicy", env, baseline="value", policy_kwargs=policy_kwargs, torch_compile=True, device="cpu")
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match=f"torch_compile=True is not allowed with this policy.*{message}"):
        model.learn(100)
    assert all(map(th.equal, before, model.policy.parameters()))


def rerun(run: Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """What a CUDA graph does: to run again on the tensors it was recorded with, and to write into what it gave then."""
    for _ in range(3):
        outputs = run(inputs)

    def replay() -> None:
        cuda.copied(outputs, run(inputs))

    return outputs, replay


@traced
@pytest.mark.filterwarnings("ignore:batch_size=48 does not divide:UserWarning")
@pytest.mark.parametrize(
    ("algorithm", "batch_size"),
    [(DualClipPPO, 32), (DualClipPPO, 48), (TRPO, 64)],  # 48: the last minibatch is smaller, and recorded for itself
)
def test_a_recording_reads_and_writes_where_it_was_made(
    algorithm: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of events on a GPU, on the CPU; what CUDA does with it is tested below, where there is one."""
    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    monkeypatch.setattr(cuda, "_recorded", rerun)
    with same_batch():
        eager, compiled = trained_both_ways(algorithm, TORQUES, learning_rate="lin_1e-3", batch_size=batch_size)
    agree_after_updates(eager, compiled, stops=False)
    agree_on_rollouts(compiled)
    for _, kept in compiled._compiled._kept.values():
        (runs,) = kept._program._runs.values()
        assert {type(run) for run in runs.values()} == {cuda.Recording}
    assert len(runs) == (2 if batch_size == 48 else 1)


@traced
def test_an_interrupted_recording_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run, inputs: list[th.Tensor]) -> Any:
        run(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    model = make_model(DualClipPPO, TORQUES, torch_compile=True)
    before = [p.clone() for p in model.policy.parameters()]
    train = model.train

    def train_interrupted() -> None:
        monkeypatch.setattr(cuda, "_recorded", interrupted)
        train()

    model.train = train_interrupted
    monkeypatch.setattr(cuda, "_recorded", rerun)
    with pytest.raises(KeyboardInterrupt):
        model.learn(128)
    assert all(map(th.equal, before, model.policy.parameters()))
    assert {state["step"].item() for state in model.policy.optimizer.state.values()} <= {0.0}


@pytest.mark.parametrize("case", ["box, everything clipped", "trpo", "reinforce"])
def test_the_compiler_for_gpus_takes_what_is_traced(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its way but its last part, which writes the kernels."""

    def compiled_in_part(graph: th.fx.GraphModule, inputs: list[th.Tensor]) -> Run:
        compiled = th.compile(graph, fullgraph=True, dynamic=False, backend="aot_eager")
        return th.no_grad()(lambda inputs: compiled(*inputs))

    monkeypatch.setattr(cpu, "machine_code", compiled_in_part)
    agree_both_ways(case)


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
    (runs,) = model._compiled._kept["step"][1]._program._runs.values()
    assert [type(run) for run in runs.values()] == [cuda.Recording]
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

    bind = Program.bind

    def bind_before(*args: Any) -> Any:  # once an update
        th.cuda.set_sync_debug_mode("default")
        return bind(*args)

    monkeypatch.setattr(Program, "bind", bind_before)
    monkeypatch.setattr(CompiledStep, "__call__", alone(CompiledStep.__call__))
    monkeypatch.setattr(type(model.rollout_buffer), "shuffled_rows", alone(type(model.rollout_buffer).shuffled_rows))
    model.learn(128, reset_num_timesteps=False)
    assert calls.count("__call__") == 12
    assert calls.count("shuffled_rows") == 3


@traced
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
    with pytest.raises(ValueError, match=r"without a C\+\+ compiler, 'g\+\+' was not found: install it"):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", torch_compile=True)
