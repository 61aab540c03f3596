"""SIGKILL at any moment: the destination is the old folder, the new one, or absent; the next export cleans
up.

The kills happen in a process of their own (this file, run as a script), which imports everything once and
forks a child for each export before any thread is started.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = (
    "open", "truncate", "posix_fallocate", "pwrite", "fsync", "fdatasync", "rename", "mkdir", "unlink",
    "rmdir",
)  # fmt: skip


def hashes(folder):
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drive(*arguments):
    """Runs a function of this file in a fresh process and returns what it reports."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_before_any_file_system_call_leaves_an_old_a_new_or_no_folder(tmp_path, earlier):
    seen = drive("at_every_call", tmp_path, int(earlier))
    assert len(seen) > 20
    assert set(seen) <= ({"absent", "old", "new"} if earlier else {"absent", "new"})
    assert seen[-1] == "new"
    assert seen.count("absent") <= (1 if earlier else len(seen))  # only between the two renames


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_what_is_whole_and_the_next_run_ends_as_if_it_had_not_been(tmp_path):
    program = Path(__file__).resolve().parents[1] / "kills.py"
    result = subprocess.run(
        [sys.executable, program, "--kills", "18", "--seed", "3", "--json"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert set(seen) == {"export", "replace", "resume", "chain", "snapshot", "training"}
    assert sum(count for states in seen.values() for count in states.values()) >= 18 + len(seen)


def child(function):
    """Forks; the child runs the function and ends."""
    process = os.fork()
    if process:
        return process
    try:
        function()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill_at(count):
    """From now on this process dies at the moment that it is about to make its n-th call into the file
    system."""
    made = 0

    def wrapped(original):
        def call(*arguments, **named):
            nonlocal made
            made += 1
            if made > count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def state_of(out, old, new):
    return next(
        (name for name, known in (("absent", None), ("old", old), ("new", new)) if hashes(out) == known),
        "broken",
    )


def at_every_call(folder, earlier):
    import test_writer
    import torch

    from daq_lightning.checkpoint.reader import load_checkpoint
    from daq_lightning.checkpoint.tensor_file import TensorSpec
    from daq_lightning.checkpoint.writer import CheckpointWriter

    def export(out, count):
        tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(count)}
        specs = [TensorSpec(name=name, dtype=torch.float32, shape=(50,)) for name in tensors]
        with CheckpointWriter(out, specs, max_shard_bytes=400) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            test_writer.describe(writer, tensors)
            writer.publish({})

    old, new = folder / "old", folder / "new"
    export(old, 2)
    export(new, 5)
    out, seen = folder / "place" / "out", []
    for count in range(500):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if earlier:
            shutil.copytree(old, out)
        process = child(lambda count=count: (kill_at(count), export(out, 5)))
        _, status = os.waitpid(process, 0)
        state = state_of(out, hashes(old), hashes(new))
        if state == "absent" and earlier:  # then the old one is still there, whole
            [aside] = out.parent.glob(".out.earlier-*")
            assert hashes(aside) == hashes(old)
        seen.append(state)
        if state == "new":
            assert set(load_checkpoint(out)) == {f"t{i}" for i in range(5)}
        export(out, 5)
        assert hashes(out) == hashes(new)
        assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return seen
    raise AssertionError("the export never came to its end")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
