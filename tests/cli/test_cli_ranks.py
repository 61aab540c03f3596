"""The command on several processes: torchrun, all GPUs of a machine, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from live import folder_bytes
from sharded_runs import launch

from daq_lightning.checkpoint.reader import load_checkpoint
from daq_lightning.cli import main, ranks

QUICK = ["--n-coarse", "2", "--n-fine", "2", "--max-shard-bytes", "40000"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny_models.make_pair(folder, tiny_models.llama)
    return folder


@pytest.fixture(scope="module")
def expected(pair) -> dict[str, bytes]:
    assert main(["quantize", *inputs(pair), "--out", str(pair / "one"), "--quiet", *QUICK]) == 0
    return folder_bytes(pair / "one")


def inputs(pair: Path) -> list[str]:
    return [str(pair / "post"), "--base", str(pair / "base")]


@pytest.mark.slow
def test_torchrun_splits_the_work_and_only_the_first_rank_speaks(pair, expected):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["daq_lightning", "quantize", *inputs(pair), "--out", str(pair / "two"), *QUICK]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FP8 export:") == 1
    assert "100%" in done.stderr
    assert folder_bytes(pair / "two") == expected


@pytest.mark.slow
def test_an_error_is_told_by_every_rank(pair):
    nowhere, out = pair / "nowhere", pair / "three"
    arguments = ["quantize", str(pair / "post"), "--base", str(nowhere), "--out", str(out)]
    for rank, (code, output) in enumerate(launch("daq_lightning", arguments, 2)):
        assert code == 1
        assert f"daq-lightning [rank {rank}]: error: --base: {nowhere} is not there." in output
    assert not out.exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_command_and_resume_completes_it_on_one_process(pair, expected, tmp_path):
    out = pair / "four"
    many = ["--n-coarse", "400", "--n-fine", "400", "--max-shard-bytes", "40000"]
    one = ["quantize", *inputs(pair), "--quiet", *many]
    assert main([*one, "--out", str(pair / "four-whole")]) == 0

    def kill(processes):
        end = time.monotonic() + 120
        while not list(pair.glob(".four.partial-*/.*.done")) and time.monotonic() < end:
            time.sleep(0.001)
        os.killpg(processes[1].pid, signal.SIGKILL)

    results = launch("daq_lightning", [*one, "--out", str(out)], 2, kill=kill)
    assert results[1][0] == -signal.SIGKILL
    if results[0][0] != 0:  # else it was quicker
        assert results[0][0] == 1
        assert "--resume" in results[0][1]
        assert not out.exists()
        assert main([*one, "--out", str(out), "--resume"]) == 0
    assert folder_bytes(out) == folder_bytes(pair / "four-whole")
    assert list(pair.glob(".four*")) == []


def test_all_gpus_of_a_machine_are_used_when_there_are_several(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append((program, arguments)))
    ranks.spread_over_gpus(["quantize", "post"], "cuda")
    [(program, arguments)] = started
    assert program == sys.executable
    assert arguments[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "daq_lightning",
        "quantize", "post",
    ]  # fmt: skip
    for device, count in (("cuda:1", 4), ("cpu", 4), (None, 4), ("cuda", 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        ranks.spread_over_gpus([], device)
    assert len(started) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks.spread_over_gpus([], "cuda")  # by torchrun already
    assert len(started) == 1
    assert [ranks.device_of_rank(device) for device in ("cuda", "cuda:0", None)] == ["cuda:1", "cuda:0", None]


def test_resume_of_nothing_is_an_export(pair, tmp_path, expected):
    arguments = ["quantize", *inputs(pair), "--out", str(pair / "five"), "--quiet", "--resume", *QUICK]
    assert main(arguments) == 0
    assert folder_bytes(pair / "five") == expected
    assert load_checkpoint(pair / "five").quantized
