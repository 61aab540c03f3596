"""One thread for each test process, and tests marked `gpu` only where there is a CUDA device."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # also for the processes that tests start; before torch is imported

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
