"""Several ranks write one export: who gets what, and what becomes of it when one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from live import end_process_group, folder_bytes
from sharded_runs import launch
from text_models import save_tokenizer, write_text
from tiny_models import llama, make_pair

from daq_lightning import CheckpointError, ExportReport, ScaleSearch
from daq_lightning.checkpoint.reader import load_checkpoint
from daq_lightning.checkpoint.tensor_file import TensorSpec
from daq_lightning.checkpoint.writer import plan_shards
from daq_lightning.export.calibration import Calibration
from daq_lightning.export.job import prepare
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.export.work import deal, share_out

QUICK = ScaleSearch(n_coarse=2, n_fine=2)
SHARD = 40_000


def job_of(folder: Path, **changes):
    settings = ExportSettings(search=QUICK, max_shard_bytes=SHARD, **changes)
    return prepare(Source.from_folder(folder / "post"), load_checkpoint(folder / "base"), settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder, llama)
    return folder


def spec(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=torch.uint8, shape=(size,))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [[5], [5, 5, 5, 5], [9, 1, 1, 1, 1, 5], []])
def test_files_are_dealt_by_bytes(world, sizes):
    shards = {f"file{i}": [spec(f"t{i}", size)] for i, size in enumerate(sizes)}
    owners = deal(shards, world)
    assert set(owners) == set(shards)
    parts = [[size for i, size in enumerate(sizes) if owners[f"file{i}"] == rank] for rank in range(world)]
    least = min(map(sum, parts))
    assert all(sum(part) - min(part) <= least for part in parts if part)  # nobody got more before another
    assert owners == deal(dict(reversed(shards.items())), world)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "W4A16"])
def test_codes_and_scale_of_a_weight_stay_in_one_file(pair, scheme):
    job = job_of(pair, scheme=scheme)
    for limit in range(1000, 60_000, 997):
        shards = plan_shards(job.plan.stored_together, limit)
        file_of = {one.name: file for file, specs in shards.items() for one in specs}
        for tensor in job.plan.tensors:
            assert len({file_of[stored.name] for stored in tensor.stored.values()}) == 1


@pytest.mark.parametrize("world", [2, 3, 40])
def test_weights_that_share_a_global_scale_are_searched_together_by_any_number_of_ranks(pair, world):
    job = job_of(pair, scheme="NVFP4A16")
    shards = plan_shards(job.plan.stored_together, SHARD)

    def batches(size):
        work = share_out(job.plan, shards, Ranks(size=size), together=True)
        return {tuple(plan.spec.name for plan in batch) for turn in work.rounds for batch in turn if batch}

    assert batches(world) == batches(1)
    assert {len(batch) for batch in batches(1)} == {1, 2, 3}


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_every_tensor_is_dealt_once_and_rounds_have_one_batch_a_rank(pair, world):
    job = job_of(pair)
    shards = plan_shards(job.plan.stored_together, SHARD)
    work = share_out(job.plan, shards, Ranks(size=world), together=True)
    dealt = [plan.spec.name for turn in work.rounds for batch in turn for plan in batch]
    assert sorted(dealt) == sorted(plan.spec.name for plan in job.plan.tensors)
    assert all(len(turn) == world for turn in work.rounds)
    assert sorted(file for rank in range(world) for file in work.files(rank)) == sorted(shards)


def test_one_process_raises_at_once():
    agreement = Agreement(ALONE)
    with pytest.raises(ValueError, match="now"), agreement.attempt():
        raise ValueError("now")
    assert ALONE.together(lambda: 3) == ALONE.first(lambda: 3) == 3
    with pytest.raises(KeyError):
        ALONE.agree(KeyError("x"))


# the rest runs in processes


def ranks(scenario: str, pair: Path, out: Path, world: int, **options) -> list[tuple[int, str]]:
    return launch(__file__, [scenario, str(pair), str(out)], world, **options)


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "out"
    run(job_of(pair), out)
    return folder_bytes(out)


def same_files(out: Path, expected: dict[str, bytes]) -> None:
    got = folder_bytes(out)
    assert set(got) == set(expected)
    # the manifest alone says where the inputs are from here
    assert [name for name in got if got[name] != expected[name] and name != "daq_manifest.json"] == []
    manifests = [json.loads(files["daq_manifest.json"]) for files in (got, expected)]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "curvature"])
def test_ranks_share_the_measuring_of_a_budget_and_round_the_same(tmp_path, rounding):
    pair = tmp_path / "pair"
    pair.mkdir()
    make_pair(pair, llama)
    write_text(save_tokenizer(pair / "post") / "text.txt", 2000)
    for code, output in ranks(f"budget {rounding}", pair, tmp_path / "out", 2):
        assert code == 0, output
    run_with_budget(pair, tmp_path / "alone", rounding, ALONE)
    placement = ExportReport.load(tmp_path / "alone").placement
    assert placement is not None
    assert placement.measure == ("curvature" if rounding == "curvature" else "update")
    assert len({group.rung for group in placement.groups}) > 1
    same_files(tmp_path / "out", folder_bytes(tmp_path / "alone"))


def run_with_budget(pair: Path, out: Path, rounding, everyone: Ranks) -> ExportReport:
    settings = ExportSettings(
        search=QUICK, max_shard_bytes=SHARD, scheme="W4A16", budget="6 bits", rounding=rounding
    )
    source, text = Source.from_folder(pair / "post"), pair / "post" / "text.txt"
    calibration = Calibration.of(text, source, settings) if rounding == "curvature" else None
    base = load_checkpoint(pair / "base")
    job = prepare(source, base, settings, ranks=everyone, calibration=calibration)
    with ExitStack() as stack:
        return run(within_budget(job, stack=stack, ranks=everyone), out, ranks=everyone)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(pair, tmp_path, expected, world):
    for code, output in ranks("export", pair, tmp_path / "out", world):
        assert code == 0, output
    same_files(tmp_path / "out", expected)
    reports = {(tmp_path / f"report{rank}.json").read_text() for rank in range(world)}
    assert len(reports) == 1
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.slow
def test_ranks_without_a_file_of_their_own_write_nothing(pair, tmp_path):
    for code, output in ranks("one_file", pair, tmp_path / "out", 4):
        assert code == 0, output
    settings = ExportSettings(search=QUICK, max_shard_bytes=10**9)
    job = prepare(Source.from_folder(pair / "post"), load_checkpoint(pair / "base"), settings)
    run(job, tmp_path / "one")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "message", "world"),
    [
        ("error", "the disk of rank 1 is gone", 4),
        ("full_disk", "No space left on device", 2),
        ("unseen", "does not see .* which rank 0 made", 2),
        ("other_plan", "differs between rank 0 and rank 1: model.layers.0.mlp.down_proj.weight is", 2),
        ("publish", "rank 0 cannot publish", 2),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all_at_once_and_nothing_is_published(
    pair, tmp_path, scenario, message, world
):
    for code, output in ranks(scenario, pair, tmp_path / "out", world):
        assert code == 0, output
    for rank in range(world):
        said = json.loads((tmp_path / f"error{rank}.json").read_text())
        assert re.search(message, said["message"]), said
        assert said["seconds"] < 10
        assert said["after"] == world  # all are still in step
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_is_killed_ends_the_others_and_the_rest_is_resumed(pair, tmp_path, expected, world):
    died = []

    def kill(processes):
        end = time.monotonic() + 120
        while len(list(tmp_path.glob(".out.partial-*/.*.done"))) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        died.append(time.monotonic())
        os.killpg(processes[1].pid, signal.SIGKILL)

    results = ranks("slow", pair, tmp_path / "out", world, kill=kill)
    assert time.monotonic() - died[0] < 30
    assert results[1][0] == -signal.SIGKILL
    for rank in {0, *range(2, world)}:
        said = json.loads((tmp_path / f"error{rank}.json").read_text())
        assert said["kind"] == "RankLostError"
        assert "--resume" in said["message"]
        assert said["since_other"] < 10
    assert not (tmp_path / "out").exists()
    [left] = [path for path in tmp_path.glob(".out.partial-*") if path.is_dir()]
    complete = {path.name.removeprefix(".").removesuffix(".done") for path in left.glob(".*.done")}
    assert len(complete) >= 2
    # another process goes on from the complete files, and reads no weight of theirs again
    read = []
    job = job_of(pair)
    original = type(job.base).read
    type(job.base).read = lambda self, name, *rest: read.append(name) or original(self, name, *rest)
    try:
        run(job, tmp_path / "out", resume=True)
    finally:
        type(job.base).read = original
    same_files(tmp_path / "out", expected)
    shards = plan_shards(job.plan.stored_together, SHARD)
    whole = {one.name for file in complete for one in shards[file]}
    assert whole
    assert not whole & set(read)
    assert list(tmp_path.glob(".out*")) == []


def _leave_unfinished(pair: Path, out: Path, monkeypatch) -> Path:
    """An export that is cut off after some files."""
    from daq_lightning.export import scales as module

    searched = []
    original = module.search_batch

    def failing(*arguments, **options):
        searched.append(0)
        if len(searched) > 8:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, "search_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        run(job_of(pair), out, resume=True)
    monkeypatch.undo()
    [left] = [path for path in out.parent.glob(".out.partial-*") if path.is_dir()]
    assert list(left.glob(".*.done"))
    return left


def test_an_export_that_is_cut_off_is_resumed(pair, tmp_path, expected, monkeypatch):
    _leave_unfinished(pair, tmp_path / "out", monkeypatch)
    run(job_of(pair), tmp_path / "out", resume=True)
    same_files(tmp_path / "out", expected)
    assert list(tmp_path.glob(".out*")) == []


def test_without_resume_what_was_left_is_removed(pair, tmp_path, expected, monkeypatch):
    _leave_unfinished(pair, tmp_path / "out", monkeypatch)
    run(job_of(pair), tmp_path / "out")
    same_files(tmp_path / "out", expected)
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("change", ["codes", "record", "numbers", "nonsense", "cut", "settings", "input"])
def test_what_is_not_whole_or_of_another_export_is_done_again(pair, tmp_path, expected, monkeypatch, change):
    left = _leave_unfinished(pair, tmp_path / "out", monkeypatch)
    records = sorted(left.glob(".*.done"))
    record = next(path for path in records if '"n": ' in path.read_text())  # of a file with codes
    file = left / record.name.removeprefix(".").removesuffix(".done")
    if change == "codes":  # one bit of the last tensor
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif change == "record":
        record.write_text(record.read_text()[:-30])
    elif change == "numbers":  # of the report, in a record that can be read
        altered = re.sub(r'"n": \d+', '"n": 7', record.read_text())
        assert altered != record.read_text()
        record.write_text(altered)
    elif change == "nonsense":
        record.write_text(json.dumps({key: [1e300, "x", None] for key in json.loads(record.read_text())}))
    elif change == "input":  # the same bytes, but written again since
        for weights in (pair / "post").glob("*.safetensors"):
            os.utime(weights)
    job = job_of(pair, **({"ignore": ("re:.*o_proj",)} if change == "settings" else {}))
    run(job, tmp_path / "out", resume=True)
    if change == "settings":
        run(job, tmp_path / "fresh")
        assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")
    else:
        same_files(tmp_path / "out", expected)
    assert list(tmp_path.glob(".out*")) == []


def _scenario(name: str, pair: Path, out: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everyone = Ranks.all()
    rank = everyone.rank
    if name in ("error", "slow"):
        from daq_lightning.export import scales as module

        original, count = module.search_batch, []

        def search(*arguments, **options):
            count.append(0)
            if name == "slow":
                time.sleep(0.3)
            elif rank == 1 and len(count) == 3:
                raise OSError("the disk of rank 1 is gone")
            return original(*arguments, **options)

        module.search_batch = search
    if name == "full_disk" and rank == 1:
        from daq_lightning.checkpoint.writer import CheckpointWriter

        def write(self, *_):
            with self._explained():
                raise OSError(28, "No space left on device")

        CheckpointWriter.write = write
    if name == "unseen":
        from daq_lightning.export import work

        work._VISIBLE = 1.0
    if name == "publish" and rank == 0:
        from daq_lightning.checkpoint.writer import CheckpointWriter

        def publish(self):
            raise CheckpointError("rank 0 cannot publish")

        CheckpointWriter.publish = publish
    start = time.monotonic()
    try:
        changes = {"ignore": ("re:.*layers.0.mlp.down_proj",)} if name == "other_plan" and rank == 1 else {}
        limit = 10**9 if name == "one_file" else SHARD
        settings = ExportSettings(search=QUICK, max_shard_bytes=limit, **changes)
        source, base = Source.from_folder(pair / "post"), load_checkpoint(pair / "base")
        job = prepare(source, base, settings, ranks=everyone)
        place = out.parent / "elsewhere" / "out" if name == "unseen" and rank == 1 else out
        if name == "unseen":  # as on a node with a disk of its own
            place.parent.mkdir(exist_ok=True)
            if rank == 1:
                Path.is_dir = lambda self: False if ".partial-" in str(self) else os.path.isdir(self)
        if name.startswith("budget"):
            report = run_with_budget(pair, place, name.split()[1], everyone)
        else:
            report = run(job, place, ranks=everyone)
    except CheckpointError as error:
        _note(out, rank, error, start, name, everyone)
    except Exception as error:
        _note(out, rank, error, start, name, everyone)
    else:
        (out.parent / f"report{rank}.json").write_text(json.dumps(report.to_dict()))
    everyone.close()
    if name != "slow":
        end_process_group()
    else:
        os._exit(0)


def _note(out: Path, rank: int, error: Exception, start: float, name: str, everyone: Ranks) -> None:
    now = time.monotonic()
    deaths = list(out.parent.glob("error*.json"))
    content = {
        "kind": type(error).__name__,
        "message": str(error),
        "seconds": now - start,
        "since_other": max((now - json.loads(path.read_text())["now"] for path in deaths), default=0.0),
        "now": now,
        "after": 0 if name == "slow" else len(everyone.gather(rank)),
    }
    (out.parent / f"error{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    _scenario(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
