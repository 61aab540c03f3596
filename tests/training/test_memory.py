"""A LoRA run makes no copy of its base: peak memory with and without the callback, in processes of their
own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LAYER = (4 * 512 * 512 + 3 * 512 * 2048) * 4  # bytes of a layer in float32
LAYERS = 10


def peak(mode: str, folder: Path) -> int:
    # with these thresholds memory that is freed goes back to the system at once, so that peaks can be
    # compared
    allocator = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    output = subprocess.run(
        [sys.executable, __file__, mode, str(folder)],
        capture_output=True, text=True, timeout=200, env=os.environ | allocator | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert output.returncode == 0, output.stderr
    return int(output.stdout.split()[-1])


def test_a_lora_run_with_the_callback_needs_at_most_a_layer_and_a_shard_more(tmp_path):
    without, with_it, copied = (peak(mode, tmp_path / mode) for mode in ("without", "with", "copied"))
    one_layer_and_one_shard = LAYER + LAYERS * LAYER // 4
    assert with_it - without < one_layer_and_one_shard
    # the same measure does see a copy of the base: ten layers in float32
    assert copied - without > 0.8 * LAYERS * LAYER


def _train(mode: str, folder: Path) -> None:
    import peft
    from live import Tuning, fit, tiny_llama

    from daq_lightning import DeltaAwareQuantization, ScaleSearch

    model = tiny_llama(hidden=512, intermediate_size=2048, num_hidden_layers=LAYERS)
    module = Tuning(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))  # type: ignore[arg-type]
    callbacks = []
    if mode != "without":
        base = {"with": "auto", "copied": "memory"}[mode]
        search = ScaleSearch(n_coarse=2, n_fine=0)
        callbacks = [DeltaAwareQuantization(str(folder), base=base, scheme="FP8_BLOCK", search=search)]
    fit(folder, *callbacks, module=module, max_steps=2)
    assert (mode == "without") != (folder / "step=2").exists()
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    _train(sys.argv[1], Path(sys.argv[2]))
