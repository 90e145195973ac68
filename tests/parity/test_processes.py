"""Two processes with an environment each train the model that one process with both environments trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th

from sb3_ppo_ext import AdaptiveKLPPO
from sb3_ppo_ext.common.compile import cpu
from tests.conftest import RunAsTraced
from tests.parity.noise import model_of, parameters, recorded
from tests.parity.parted import CASES, LENGTHS
from tests.several import run

N_UPDATES = 2


def trained_by_one(name: str) -> tuple[Any, dict[str, Any]]:
    """
    A model that one process has trained for two updates, and what of it the others need.

    :param name: of the case
    """
    algorithm, kwargs = CASES[name]
    model = model_of(algorithm, LENGTHS, **kwargs)
    recording: dict[str, Any] = {"parameters": parameters(model), "rollouts": []}
    collect = model._collect

    def collect_and_record(*args: Any) -> bool:
        is_complete: bool = collect(*args)
        recording["rollouts"].append(recorded(model))
        return is_complete

    model._collect = collect_and_record
    n_steps = max(LENGTHS) * model.episodes_per_env if hasattr(model, "episodes_per_env") else model.n_steps
    recording["total_timesteps"] = N_UPDATES * n_steps * len(LENGTHS)
    model.learn(recording["total_timesteps"])
    return model, recording


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]]:
    """Of each case, the model of one process, what it was recorded from, and the results of two."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cpu, "machine_code", RunAsTraced)
        ones = {name: trained_by_one(name) for name in CASES}
    th.save({name: recording for name, (_, recording) in ones.items()}, folder / "recordings.pt")
    statuses, said = zip(*run("tests.parity.parted", folder, {"parity": 2})["parity"], strict=True)
    assert statuses == (0, 0), "\n".join(said)
    results = [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: (*one, [result[name] for result in results]) for name, one in ones.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, trained: Any) -> None:
    model, recording, results = trained[name]
    assert len(recording["rollouts"]) == N_UPDATES
    assert not all(map(th.equal, recording["parameters"], parameters(model)))
    for result in results:
        th.testing.assert_close(result["parameters"], parameters(model), atol=1e-5, rtol=0.0)
        assert result["num_timesteps"] == model.num_timesteps == recording["total_timesteps"]
    assert all(map(th.equal, results[0]["parameters"], results[1]["parameters"]))
    expected = model.logger.name_to_value
    logged = results[0]["logged"]
    assert logged.keys() >= {key for key in expected if key.startswith("train/")}
    for key in (
        "policy_gradient_loss",
        "entropy_loss",
        "value_loss",
        "grad_norm",
        "early_stop_epoch",
        "actual_improvement",
        "kl",
    ):
        if f"train/{key}" in expected:
            assert logged[f"train/{key}"] == pytest.approx(expected[f"train/{key}"], rel=1e-3, abs=1e-6), key
    if model.kl_adaptive_lr is not None:
        assert [result["logged"]["train/learning_rate"] for result in results] == [model.learning_rate] * 2
        assert model.learning_rate not in (0.01, 0.1)
        assert "train/early_stop_epoch" in expected
    if isinstance(model, AdaptiveKLPPO):
        assert logged["train/kl_coef"] == expected["train/kl_coef"]
    if "target_kl" in name:
        assert "train/early_stop_epoch" in expected
