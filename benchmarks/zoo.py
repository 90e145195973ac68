"""A model as the RL Zoo makes it of an entry, for a benchmark that trains in its own process."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sb3_ppo_ext.zoo import ZooExperimentManager

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


@contextlib.contextmanager
def quiet_experiment(
    algo: str, env: str, hyper_parameters: Mapping[str, Any], seed: int
) -> Iterator[tuple[ZooExperimentManager, BaseAlgorithm, str]]:
    """
    Inside of ``with``, nothing is printed.

    :param algo: the algorithm's key
    :param env: id of the environment
    :param hyper_parameters: as an entry of rl_zoo3's configurations has them
    :param seed: of all
    :return: what makes environments and knows the number of steps, the model, and a folder that is there meanwhile
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        config = Path(folder, "entry.yml")
        config.write_text(yaml.safe_dump({env: dict(hyper_parameters)}))
        manager = ZooExperimentManager(
            argparse.Namespace(),
            algo,
            env,
            folder,
            eval_freq=-1,
            seed=seed,
            config=str(config),
            verbose=0,
            device="cpu",
        )
        experiment = manager.setup_experiment()
        assert experiment is not None
        yield manager, experiment[0], folder
