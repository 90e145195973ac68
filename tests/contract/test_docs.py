"""The documentation is right: its code runs, its files exist, and each logged key and public name is explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger

import sb3_ppo_ext
from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO, losses, numerics
from sb3_ppo_ext.doctor.keys import MEANINGS
from tests.algorithms import small
from tests.code_blocks import ROOT, blocks, run, short_trainings

__all__ = ["short_trainings"]  # a fixture

README = ROOT / "README.md"
PAGES = [README, *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
FILE = r"`((?:sb3_ppo_ext|tests|benchmarks|zoo_configs|docs)/[\w/.-]+\.\w+)`"
NEEDS = ("cuda", "torch.distributed")  # what a block that is not run needs; one of them is in it


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the notebooks is in cells, which the build of the documentation executes."""
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_is_left_out_only_where_it_needs_a_gpu_or_several_processes(page: Path) -> None:
    for block in blocks(page):
        assert block.runs or any(word in block.code for word in NEEDS), f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(FILE, page.read_text()):
        assert (ROOT / path).is_file(), path


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """Those of the pages are checked where they are built."""
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).is_file()] == []
    assert len(README.read_text().splitlines()) <= 200


def test_every_public_name_has_an_entry() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    entries = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", pages, flags=re.MULTILINE)
    public = [f"{module.__name__}.{name}" for module in (sb3_ppo_ext, losses, numerics) for name in module.__all__]
    assert set(public) - set(entries) == {"sb3_ppo_ext.__version__"}
    assert len(set(entries)) == len(entries)


class Succeeds(gym.Wrapper):
    """Episodes of 20 steps that say that they have succeeded."""

    def __init__(self, env: gym.Env | None = None) -> None:
        super().__init__(env or gym.make("Pendulum-v1", max_episode_steps=20))

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "is_success": True}


class Keys(KVWriter):
    """Collects the keys that are logged."""

    def __init__(self) -> None:
        self.logged: set[str] = set()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.logged |= key_values.keys()

    def close(self) -> None:
        pass


def test_the_page_about_logs_explains_every_key() -> None:
    """And no key that nobody logs: the trainings are such that all are logged."""
    keys = Keys()
    both: dict[str, Any] = {"policy_kwargs": {"critic_learning_rate": 1e-3}, "clip_range": 0.1, "clip_range_vf": 0.1}
    trainings: list[tuple[Any, dict[str, Any]]] = [
        (DualClipPPO, {**both, "clip_range_high": 0.2, "target_kl": 1e-9}),
        (AdaptiveKLPPO, {**both, "kl_adaptive_lr": {}, "n_reused_rollouts": 1, "reuse": {"proximal": "newest"}}),
        (DualClipPPO, {"reuse": {"proximal": "ewma"}}),
        (TRPO, {}),
        (REINFORCE, {"reference_policy": "initial"}),
    ]
    evaluation = EvalCallback(make_vec_env(Succeeds), n_eval_episodes=1, eval_freq=40, verbose=0)
    for algorithm, arguments in trainings:
        model = small(algorithm, "MlpPolicy", make_vec_env(Succeeds), **arguments)
        model.set_logger(Logger(None, [keys]))
        model.learn(100, callback=evaluation if algorithm is TRPO else None)
    page = (ROOT / "docs/guide/logs.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+/\w+)` \| (\S.*\.) \|$", page, flags=re.MULTILINE))
    assert rows.keys() == keys.logged
    assert rows == {key: MEANINGS[key] for key in rows}
