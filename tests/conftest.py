"""What all tests share."""

import pytest
import torch as th

th.set_num_threads(1)  # small networks run fastest on one thread, and sums then always add in one order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if th.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
