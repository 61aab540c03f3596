"""SIGKILL at any moment: the destination is the old folder, the new one, or absent; the next export cleans
up.

The kills happen in a process of their own (this file, run as a script), which imports everything once and
forks a child for each export before any thread is started.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
def test_a_kill_at_any_time_leaves_a_complete_export_or_none_and_the_next_one_succeeds(tmp_path):
    seen = drive("at_random_times", tmp_path, 12)
    assert len(seen) == 12
    assert {state for state, _ in seen} <= {"absent", "new"}
    assert sum(killed for _, killed in seen) >= 6


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


def at_random_times(folder, kills):
    import tiny_models
    import torch

    from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint

    torch.set_num_threads(1)
    base, post = tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=4, vocab_size=512))

    def export(out):
        search = ScaleSearch(n_coarse=4, n_fine=2)
        export_checkpoint(post, base, out, search=search, max_shard_bytes=200_000)

    reference, out = folder / "reference" / "out", folder / "place" / "out"
    out.parent.mkdir()
    for _ in range(2):  # the first of an architecture takes longer: it makes the outline, which is kept
        started = time.monotonic()
        assert os.waitpid(child(lambda: export(reference)), 0)[1] == 0
        duration = time.monotonic() - started
    generator, seen = random.Random(0), []
    for _ in range(kills):
        process = child(lambda: export(out))
        time.sleep(generator.uniform(0.1, 1.0) * duration)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        state = state_of(out, None, hashes(reference))
        seen.append((state, killed))
        if state == "new":
            assert len(load_checkpoint(out)) > 0
            shutil.rmtree(out)
    assert os.waitpid(child(lambda: export(out)), 0)[1] == 0
    assert hashes(out) == hashes(reference)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return seen


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
