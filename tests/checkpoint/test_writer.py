"""A written folder is complete or not there, and the same input makes the same bytes."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from daq_lightning.checkpoint import writer as writer_module
from daq_lightning.checkpoint.destination import check_destination
from daq_lightning.checkpoint.folder import MANIFEST, REPORT
from daq_lightning.checkpoint.manifest import Lineage, Manifest
from daq_lightning.checkpoint.reader import load_checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.checkpoint.writer import CheckpointWriter, plan_shards


def tensors_of(count=5, size=100):
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(size + i, generator=generator) for i in range(count)}


def specs_of(tensors):
    return [
        TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def write(out, tensors, *, max_shard_bytes=10**9, config=None, reverse=False):
    with CheckpointWriter(out, specs_of(tensors), max_shard_bytes) as writer:
        for name in sorted(tensors, reverse=reverse):
            writer.write(name, tensors[name])
        describe(writer, tensors)
        writer.publish(config)
    return out


def describe(writer, tensors):
    """Report and manifest, which make a folder an export."""
    manifest = Manifest(
        scheme="",
        dtype="",
        quantization_config={},
        settings={},
        versions={},
        lineage=Lineage(),
        tensors={},
        kept=dict.fromkeys(tensors, ""),
        files={name: {"size": 0, "sha256": ""} for name in (REPORT, "config.json")},
    )
    writer.write_json(REPORT, {})
    writer.write_json(MANIFEST, manifest.to_dict())


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("limit", "files"),
    [(10**9, [5]), (1, [1, 1, 1, 1, 1]), (404, [1, 1, 1, 1, 1]), (804, [2, 1, 1, 1]), (900, [2, 2, 1])],
)
def test_a_file_begins_when_the_next_tensor_does_not_fit(limit, files):
    shards = plan_shards(specs_of(tensors_of()), limit)
    assert [len(specs) for specs in shards.values()] == files
    assert [spec.name for specs in shards.values() for spec in specs] == list(tensors_of())
    if len(files) == 1:
        assert list(shards) == ["model.safetensors"]
    else:
        assert next(iter(shards)) == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(spec.nbytes for spec in specs) <= limit for specs in shards.values() if len(specs) > 1)


def test_shards_hold_what_their_index_says_and_its_total_is_true(tmp_path):
    tensors = tensors_of()
    out = write(tmp_path / "out", tensors, max_shard_bytes=900, config={"a": 1})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for name, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(out / file)[name], tensors[name])
    assert json.loads((out / "config.json").read_text()) == {"a": 1}
    assert names_in(tmp_path) == ["out"]
    others = {"model.safetensors.index.json", "config.json", REPORT, MANIFEST}
    assert {*index["weight_map"].values(), *others} == set(names_in(out))


def test_one_file_needs_no_index(tmp_path):
    assert names_in(write(tmp_path / "out", tensors_of())) == [MANIFEST, REPORT, "model.safetensors"]


@pytest.mark.parametrize("limit", [900, 10**9])
def test_order_and_threads_of_writing_change_no_byte(tmp_path, limit):
    tensors = tensors_of(20)
    first = write(tmp_path / "a", tensors, max_shard_bytes=limit)
    second = write(tmp_path / "b", tensors, max_shard_bytes=limit, reverse=True)
    with CheckpointWriter(tmp_path / "c", specs_of(tensors), limit) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(writer.write, tensors, tensors.values()))
        describe(writer, tensors)
        writer.publish()
    assert hashes(first) == hashes(second) == hashes(tmp_path / "c")


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced, published, fsync, rename = set(), [], os.fsync, os.rename

    def record(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def check(source, target):
        published.append({str(path) for path in [source, *source.rglob("*")]} - synced)
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    write(tmp_path / "out", tensors_of(), max_shard_bytes=900, config={})
    assert published == [set()]
    assert synced == {str(tmp_path)}  # and then the name itself


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_leaves_nothing_and_an_earlier_export_untouched(tmp_path, earlier, error):
    out = tmp_path / "out"
    if earlier:
        write(out, tensors_of(3))
    before = hashes(out) if earlier else {}
    with pytest.raises(error), CheckpointWriter(out, specs_of(tensors_of())) as writer:
        writer.write("t0", tensors_of()["t0"])
        raise error
    assert names_in(tmp_path) == (["out"] if earlier else [])
    assert hashes(out) == before if earlier else not out.exists()


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "out", specs_of(tensors_of())):
        assert len(names_in(tmp_path)) == 2
        assert all(name.startswith(".out.partial-") for name in names_in(tmp_path))
    assert names_in(tmp_path) == []


def test_an_unfinished_folder_cannot_be_published(tmp_path):
    with (
        pytest.raises(AssertionError, match="4 tensors"),
        CheckpointWriter(tmp_path / "out", specs_of(tensors_of())) as writer,
    ):
        writer.write("t0", tensors_of()["t0"])
        writer.publish()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("value", [torch.zeros(100).half(), torch.zeros(99), torch.zeros(100, 1)])
def test_a_tensor_that_was_not_planned_like_this_is_not_written(tmp_path, value):
    with (
        pytest.raises(AssertionError, match="planned"),
        CheckpointWriter(tmp_path / "out", specs_of(tensors_of())) as writer,
    ):
        writer.write("t0", value)


def test_an_export_replaces_an_earlier_one_and_no_file_of_that_remains(tmp_path):
    out = write(tmp_path / "out", tensors_of(), max_shard_bytes=1, config={})
    assert len(names_in(out)) == 9
    write(out, tensors_of(2))
    assert names_in(out) == [MANIFEST, REPORT, "model.safetensors"]
    assert set(load_checkpoint(out)) == {"t0", "t1"}
    assert names_in(tmp_path) == ["out"]


def test_a_failure_while_the_folder_gets_its_name_puts_the_earlier_export_back(tmp_path, monkeypatch):
    out = write(tmp_path / "out", tensors_of(3))
    before, rename = hashes(out), os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(out, tensors_of())
    assert hashes(out) == before
    assert names_in(tmp_path) == ["out"]


def foreign_folder(out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def foreign_file(out):
    out.write_text("x")


def link(out):
    write(out.parent / "elsewhere", tensors_of(1))
    out.symlink_to("elsewhere")


def below_a_file(out):
    out.parent.rmdir()
    out.parent.write_text("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_folder, "was not written by this package"),
        (foreign_file, "is not a folder"),
        (link, "is not a folder"),
        (below_a_file, "could not be written"),
    ],
)
def test_a_destination_that_is_not_ours_is_refused_before_any_work(tmp_path, make, message):
    out = tmp_path / "sub" / "out"
    out.parent.mkdir()
    make(out)
    before = hashes(tmp_path)
    for attempt in (lambda: check_destination(out), lambda: CheckpointWriter(out, specs_of(tensors_of()))):
        with pytest.raises(CheckpointError, match=message):
            attempt()
    assert hashes(tmp_path) == before


def test_a_destination_that_became_foreign_during_the_work_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(CheckpointError, match="not written by this package"),
        CheckpointWriter(out, []) as writer,
    ):
        foreign_folder(out)
        writer.publish()
    assert names_in(out) == ["thesis.txt"]
    assert names_in(tmp_path) == ["out"]


def test_an_empty_folder_and_missing_parents_are_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tensors_of())
    write(tmp_path / "a" / "b" / "out", tensors_of())
    assert hashes(tmp_path / "out") == hashes(tmp_path / "a" / "b" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_parent_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="no permission"):
            check_destination(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


FULL = """
import resource, sys, torch
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.checkpoint.writer import CheckpointWriter
out, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with CheckpointWriter(out, [TensorSpec(name="a", dtype=torch.float32, shape=(1000,))]) as writer:
        writer.write("a", torch.zeros(1000))
        writer.add_files(lambda folder: (folder / "tokenizer.json").write_text("x" * 5000))
        writer.publish()
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 1000, 4500])  # in the header, in the data, in another file
def test_a_file_that_may_not_grow_is_a_clear_error_and_leaves_nothing(tmp_path, limit):
    write(tmp_path / "out", tensors_of())
    before = hashes(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "out"), str(limit)], capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr
    assert "File too large" in result.stdout
    assert "free some space" in result.stdout
    assert hashes(tmp_path) == before
    assert names_in(tmp_path) == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_known_before_the_first_tensor_is_made(small_disk):
    write(small_disk / "out", tensors_of())
    before = hashes(small_disk / "out")
    big = [TensorSpec(name="a", dtype=torch.float32, shape=(100_000,))]
    with (
        pytest.raises(CheckpointError, match=r"No space left on device.*GB free"),
        CheckpointWriter(small_disk / "out", big),
    ):
        raise AssertionError("unreachable")
    assert names_in(small_disk) == ["out"]
    assert hashes(small_disk / "out") == before


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(small_disk):
    spec = TensorSpec(name="a", dtype=torch.float32, shape=(40_000,))
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        CheckpointWriter(small_disk / "out", [spec]) as writer,
    ):
        writer.write("a", torch.zeros(40_000))
        writer.write_json(REPORT, {"x": "y" * 200_000})
    assert names_in(small_disk) == []


def leave_behind(out, kind):
    """What a killed export leaves: `kind` names the moment."""
    folder, lock = writer_module._reserve(out)
    if kind != "before the folder":
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    os.close(lock)


@pytest.mark.parametrize("kind", ["before the folder", "while writing"])
def test_what_killed_exports_left_is_removed_by_the_next(tmp_path, kind):
    leave_behind(tmp_path / "out", kind)
    leave_behind(tmp_path / "out2", kind)
    others = [name for name in names_in(tmp_path) if ".out2." in name]
    write(tmp_path / "out", tensors_of())
    assert names_in(tmp_path) == [*others, "out"]


@pytest.mark.parametrize("name", ["out[1]", "o*t", "step=10", "a?b"])
def test_names_with_wildcards_mean_only_themselves(tmp_path, name):
    leave_behind(tmp_path / name, "while writing")
    leave_behind(tmp_path / "out1", "while writing")
    write(tmp_path / name, tensors_of())
    assert name in names_in(tmp_path)
    assert len(names_in(tmp_path)) == 3


@pytest.mark.parametrize("published", [True, False])
def test_an_export_that_was_killed_while_replacing_is_put_back_or_removed(tmp_path, published):
    earlier = write(tmp_path / ".out.earlier-1234", tensors_of(1))
    before = hashes(earlier)
    if published:
        write(tmp_path / "other", tensors_of(2))
        os.rename(tmp_path / "other", tmp_path / "out")
        before = hashes(tmp_path / "out")
    with pytest.raises(ValueError, match="later"), CheckpointWriter(tmp_path / "out", []):
        raise ValueError("later")
    assert names_in(tmp_path) == ["out"]
    assert hashes(tmp_path / "out") == before


def test_the_folder_of_a_living_export_is_left_alone(tmp_path):
    tensors = tensors_of()
    with CheckpointWriter(tmp_path / "out", specs_of(tensors)) as first:
        write(tmp_path / "out", tensors_of(1))
        assert first.folder.is_dir()
        for name, tensor in tensors.items():
            first.write(name, tensor)
        describe(first, tensors)
        first.publish()
    assert set(load_checkpoint(tmp_path / "out")) == set(tensors)
    assert names_in(tmp_path) == ["out"]


def test_a_lock_that_was_taken_for_a_leftover_before_it_was_held_is_made_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".out.lock"):
            return flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:  # between open and flock, another export removes the lock
            [path] = tmp_path.glob(".out.partial-*.lock")
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "out", tensors_of())
    assert len(calls) == 2
    assert names_in(tmp_path) == ["out"]


RACER = """
import sys, time
from pathlib import Path
import test_writer
place, tensors = Path(sys.argv[1]), test_writer.tensors_of(int(sys.argv[2]))
while not (place / "go").exists():
    time.sleep(0.001)
for _ in range(int(sys.argv[3])):
    test_writer.write(place / "out", tensors, max_shard_bytes=500)
"""


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [True, False])
def test_many_processes_that_export_to_one_place_at_once_all_succeed(tmp_path, earlier):
    (tmp_path / "reference").mkdir()
    expected = [
        hashes(write(tmp_path / "reference" / str(i), tensors_of(i), max_shard_bytes=500))
        for i in range(1, 5)
    ]
    if earlier:
        write(tmp_path / "out", tensors_of())
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    racers = [
        subprocess.Popen([*command, str(i), "40"], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(1, 5)
    ]
    (tmp_path / "go").touch()
    errors = [racer.communicate()[1] for racer in racers]
    assert [(racer.returncode, error) for racer, error in zip(racers, errors, strict=True)] == [(0, "")] * 4
    assert hashes(tmp_path / "out") in expected
    assert names_in(tmp_path) == ["go", "out", "reference"]


def test_threads_that_export_to_one_place_at_once_all_succeed(tmp_path):
    tensors = tensors_of()
    expected = hashes(write(tmp_path / "reference", tensors))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write(tmp_path / "out", tensors), range(20)))
    assert hashes(tmp_path / "out") == expected
    assert names_in(tmp_path) == ["out", "reference"]


def test_open_files_are_closed_again(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for limit in (1, 10**9):
        write(tmp_path / "out", tensors_of(), max_shard_bytes=limit)
        with (
            pytest.raises(ValueError, match="x"),
            CheckpointWriter(tmp_path / "out", specs_of(tensors_of()), limit),
        ):
            raise ValueError("x")
    assert len(os.listdir("/proc/self/fd")) == before
