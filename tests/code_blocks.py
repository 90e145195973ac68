"""The Python code of the pages that people read, and how it is run in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_ext.common.model import Model

ROOT = Path(__file__).parents[1]

# No training in an example is longer than this, and no rollout or update larger. Nothing is compiled.
MAX_STEPS = 256
AT_MOST = {
    "n_steps": 64,
    "batch_size": 64,
    "n_epochs": 2,
    "n_critic_updates": 2,
    "episodes_per_env": 1,
    "torch_compile": False,
}


class Block(NamedTuple):
    """
    A block of Python in a page.

    :param code: what stands in it
    :param line: of the page, of its first line
    :param runs: whether it can be run anywhere; a block that cannot is marked ``python no-run``
    """

    code: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    """
    All blocks of Python in a page, in order.

    :param page: a file of Markdown
    """
    found = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info.split()[:1] == ["python"]:
            assert token.map is not None
            marks = token.info.split()[1:]
            assert marks in ([], ["no-run"]), f"{page}:{token.map[0] + 1}: {token.info}"
            found.append(Block(token.content, token.map[0] + 2, not marks))
    return found


def run(page: Path) -> dict[str, Any]:
    """
    Run the blocks of a page, one after the other, with the names that the earlier ones have made.

    :param page: a file of Markdown
    :return: the names
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for code, line, runs in blocks(page):
        if runs:  # with its line numbers, so that a traceback names the line of the page
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    return names


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of examples are short and not compiled, those of SB3's and sb3-contrib's algorithms too."""
    learn = OnPolicyAlgorithm.learn

    def learn_little(self: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)

    def small(set_up: Callable[[Any], None]) -> Callable[[Any], None]:
        def set_up_small(self: Any) -> None:
            for name, most in AT_MOST.items():
                if hasattr(self, name):
                    setattr(self, name, min(getattr(self, name), most))
            set_up(self)

        return set_up_small

    monkeypatch.setattr(OnPolicyAlgorithm, "learn", learn_little)
    for algorithm in (OnPolicyAlgorithm, Model):  # SB3's and sb3-contrib's, and ours
        monkeypatch.setattr(algorithm, "_setup_model", small(algorithm._setup_model))
