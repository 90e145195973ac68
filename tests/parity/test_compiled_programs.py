"""Programs are compiled once, kept for later runs, and used only for what they are for; or it is said why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_ext import REINFORCE, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import cpu, products
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.torch_internals import traced
from tests.algorithms import ROLLOUT, assert_close_policies, small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv
from tests.parity.compiled import (
    agree_after_updates,
    make_model,
    trained_both_ways,
)


@pytest.mark.usefixtures("without_compiler")
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


@pytest.mark.usefixtures("without_compiler")
def test_what_a_policy_does_to_images_may_change() -> None:
    """A step, an actor and an evaluation of before would divide by 255 what is no longer to be divided."""
    models: list[Any] = []
    for torch_compile in (False, True):
        env = ScriptedEnv(spaces.Box(0, 255, (1, 2, 2), np.uint8), BOX_ACTIONS)
        models.append(small(DualClipPPO, "MlpPolicy", env, torch_compile=torch_compile).learn(ROLLOUT))
        models[-1].policy.normalize_images = False
        models[-1].learn(ROLLOUT, reset_num_timesteps=False)
    assert_close_policies(*models, atol=2e-5)


@pytest.mark.slow
def test_a_later_run_finds_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where what it finds is not whole. What is of another size is compiled for itself, not found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    package = th._inductor.aoti_compile_and_package
    packages: dict[str, bytes] = {}

    class CompilesAnotherError(Exception):
        pass

    def noted(program: Any, *, package_path: str, **_: Any) -> str:
        """The compiler, which takes its time once, for the first program."""
        path = Path(package_path)
        compiled.append(path.name)
        if not packages:
            package(program, package_path=package_path)
            packages[path.name] = path.read_bytes()
        if path.name not in packages:
            raise CompilesAnotherError
        path.write_bytes(packages[path.name])
        return package_path

    monkeypatch.setattr(th._inductor, "aoti_compile_and_package", noted)

    def doubled(width: int) -> list[float]:
        program = Program(lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="", announce=False)
        program.bind([th.ones(width)])
        return program(th.ones(width))[0].tolist()

    assert doubled(2) == doubled(2) == [3.0, 3.0]
    assert len(compiled) == 1
    with pytest.raises(CompilesAnotherError):
        doubled(3)
    assert len(set(compiled)) == 2
    (file,) = tmp_path.glob("sb3_ppo_ext/*.pt2")
    assert file.name == compiled[0]
    whole = file.read_bytes()
    middle = len(whole) // 2  # in the machine code, which would be run
    for i, damaged in enumerate((whole[:1000], b"", whole[:middle] + bytes(99) + whole[middle + 99 :])):
        file.write_bytes(damaged)
        assert doubled(2) == doubled(2) == [3.0, 3.0]
        assert compiled[2:] == [file.name] * (i + 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"_MANY": 1, "_LONG_SIDE": 1}, {"_COLUMNS": 64}, {"_WIDE": 1, "_FEW_TERMS": 10}])
def test_products_another_way(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of processors where MKL is slow: oneDNN's, transposed, in the compiler's loops."""
    another_way = 0

    def counted(x: th.Tensor, weight: th.Tensor) -> Any:
        nonlocal another_way
        product = way(x, weight)
        another_way += product is not NotImplemented
        return product

    way = products._mm
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "is_mkl_slow", lambda: True)
    monkeypatch.setattr(products, "_mm", counted)
    for name, value in {"_FEW": 0, **sizes}.items():
        monkeypatch.setattr(products, name, value)
    eager, compiled = trained_both_ways(DualClipPPO, spaces.Discrete(3))
    assert another_way >= 4
    agree_after_updates(eager, compiled, stops=False)


@pytest.mark.parametrize(
    ("x", "weight", "way"),
    [
        ((64, 17), (17, 64), "MKL's"),
        ((64, 64), (64, 6), "transposed"),
        ((64, 64), (64, 1), "MKL's"),
        ((64, 64), (64, 17), "transposed"),
        ((17, 64), (64, 64), "MKL's"),
        ((256, 4), (4, 1024), "the compiler's"),
        ((256, 4), (4, 64), "MKL's"),
        ((1024, 256), (256, 4), "transposed"),
        ((256, 256), (256, 256), "oneDNN's"),
        ((16, 256), (256, 1024), "oneDNN's"),
    ],
)
@pytest.mark.parametrize("is_mkl_slow", [False, True])
def test_ways_of_products(
    x: tuple[int, int], weight: tuple[int, int], way: str, is_mkl_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "is_mkl_slow", lambda: is_mkl_slow)
    inputs = [th.randn(x), th.randn(weight[::-1]).t()]
    graph = traced(lambda x, weight: [x @ weight], inputs, products.cpu_products())
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    expected = way if is_mkl_slow else "MKL's"
    assert (th.ops.sb3_ppo_ext.linear_by_onednn.default in targets) == (expected == "oneDNN's")
    assert (th.ops.aten.mm.default in targets) == (expected in ("MKL's", "transposed"))
    assert (th.ops.aten.t.default in targets) == (expected in ("transposed", "oneDNN's"))
    [product] = graph(*inputs)
    assert product.is_contiguous()  # as a layer may need it, for example for a view
    th.testing.assert_close(product, inputs[0] @ inputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_terms", "by_onednn"), [(1024, True), (32, False)])
def test_copies_are_little_beside_the_product(n_terms: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN copies transposed matrices, as those of a weight's gradient."""
    monkeypatch.setattr(cpu, "is_mkl_slow", lambda: True)
    inputs = [th.randn(n_terms, 256).t(), th.randn(n_terms, 256)]
    graph = traced(lambda x, weight: [x @ weight], inputs, products.cpu_products())
    targets = {node.target for node in graph.graph.nodes}
    assert (th.ops.sb3_ppo_ext.linear_by_onednn.default in targets) == by_onednn


@pytest.mark.parametrize(
    ("vendor", "flags", "is_slow"),
    [
        ("AuthenticAMD", "fma avx2 avx512f", True),
        ("AuthenticAMD", "fma avx2", False),
        ("GenuineIntel", "fma avx2 avx512f", False),
        (None, "", False),
    ],
)
def test_where_mkl_is_slow(vendor: str | None, flags: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = {} if vendor is None else {"vendor_id": vendor, "flags": flags}
    monkeypatch.setattr(cpu, "_processor", lambda: processor)
    monkeypatch.setattr(th.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: True)
    assert cpu.is_mkl_slow.__wrapped__() == is_slow


@pytest.mark.usefixtures("without_compiler")
def test_what_is_given_in_another_layout_is_not_misread() -> None:
    program = Program(lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="", announce=False)
    program.bind([th.ones(4)])
    x = th.arange(12.0).view(3, 4)
    for given in (x, x[:2], x.double(), x.t().contiguous().t()):
        th.testing.assert_close(program(given), [1.0 + 2.0 * given])


@pytest.mark.usefixtures("without_compiler")
def test_a_number_that_is_kept_on_another_device_is_refused() -> None:
    """A recording for a GPU would have its value of that moment for ever; one that is made anew has no other."""
    x = th.ones(2, device="meta")

    def call(function: Any) -> Any:
        program = Program(function, x.device, what="", announce=False)
        program.bind([x])
        return program(x)

    kept = th.tensor(2.0)
    with pytest.raises(ValueError, match="a tensor on the device cpu is read; move it to meta with the policy"):
        call(lambda fixed, batch, x: [fixed[0] + kept * x])
    assert call(lambda fixed, batch, x: [fixed[0] + th.tensor(2.0) * x])[0].device == x.device


@pytest.mark.usefixtures("without_compiler")
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


@pytest.mark.usefixtures("without_compiler")
def test_minibatches_of_all_sizes_are_one_program(programs: list[str]) -> None:
    """The first rollout is one minibatch, of 4 samples; the second has 33, in two of 32 and 1; each is padded to 32."""
    script = ((4, True, False), (33, True, False))
    models: list[Any] = []
    for compiled in (False, True):
        env = make_vec_env(lambda: ScriptedEnv(BOX, BOX_ACTIONS, script), seed=0)
        kwargs: dict[str, Any] = {"baseline": "value", "episodes_per_env": 1, "batch_size": 32, "n_critic_updates": 2}
        model = REINFORCE("MlpPolicy", env, seed=0, device="cpu", torch_compile=compiled, **kwargs)
        np.random.seed(0)  # noqa: NPY002  # the minibatches
        models.append(model.learn(37))
    assert programs == ["the actor", "the evaluation of rollouts", "the gradient step"]
    agree_after_updates(*models, stops=False)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore:batch_size=48 does not divide")
def test_minibatches_of_sequences_are_one_program(programs: list[str]) -> None:
    """The last of an epoch has 32 of 48 samples, and is padded."""
    kwargs: dict[str, Any] = {"policy": "MlpLstmPolicy", "batch_size": 48, "n_epochs": 2, "sequence_length": 4}
    models = trained_both_ways(DualClipPPO, spaces.Discrete(3), **kwargs)
    assert programs == ["the actor", "the gradient step"]
    agree_after_updates(*models, stops=False)


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


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("if", "the same operations for all values"),
        ("replaced", "mean is replaced by another tensor"),
    ],
)
def test_a_network_that_cannot_be_compiled_is_refused_before_training(how: str, message: str) -> None:
    env = make_vec_env(lambda: ScriptedEnv(BOX, BOX_ACTIONS, ((9, True, False),)), seed=0)
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
