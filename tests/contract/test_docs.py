"""The documentation says what is so: its code runs, its files exist, and it explains every key that is logged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.code_blocks import ROOT, blocks, run, short_trainings

__all__ = ["short_trainings"]  # a fixture

PAGES = sorted((ROOT / "docs").rglob("*.md"))
FILE = r"`((?:sb3_ppo_ext|tests|benchmarks|zoo_configs|docs)/[\w/.-]+\.\w+)`"
NEEDS = ("cuda", "torch.distributed")  # what a block that is not run needs; one of them is in it


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
