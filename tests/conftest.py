"""One thread for each test process, helpers for all, `gpu` tests only where there is a CUDA device."""

import os
from pathlib import Path

# before torch is imported, and also for the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
# no test leaves this machine: nobody listens there, and tests of the Hub bring a server of their own
os.environ["HF_ENDPOINT"], os.environ["HF_HUB_DISABLE_XET"] = "http://127.0.0.1:9", "1"
TESTS = Path(__file__).resolve().parent
PATHS = [TESTS.parent, TESTS, TESTS / "numerics", os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, PATHS)))

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
