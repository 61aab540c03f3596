"""What a report says of a batch of weights leaves their device in one transfer."""

import threading

import pytest
import tiny_models
import torch

from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.export.work import batches_of
from daq_lightning.numerics.objectives import DeltaStats, measure

QUICK = ScaleSearch(n_coarse=2, n_fine=1)


def stats_of(shape=()):
    counts = [torch.full(shape, 2**53 - 1 - i, dtype=torch.int64) for i in range(6)]
    totals = [torch.full(shape, 1 / (3 + i), dtype=torch.float64) for i in range(4)]
    return DeltaStats(*counts, *totals)


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (0,)], ids=str)
def test_packed_sums_come_out_bit_for_bit(shape):
    stats = stats_of(shape)
    packed = stats.packed()
    assert packed.dtype == torch.float64
    assert packed.shape == (10, *shape)
    for name, one, two in zip(DeltaStats._fields, stats, DeltaStats.unpacked(packed), strict=True):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name


@pytest.fixture
def in_a_chain(tmp_path):
    """A job with all sides of the report: experts in batches, and the base of a chain's first stage."""
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen3_moe)
    export_checkpoint(post, base, tmp_path / "stage", search=QUICK)
    parent, source = str(tmp_path / "stage"), Source.from_folder(base)  # trained back to where it came from
    settings = ExportSettings(search=QUICK)
    return prepare(source, load_checkpoint(post), settings, parent=parent, chain_from="weights"), tmp_path


def test_sums_leave_the_device_once_per_batch(in_a_chain, monkeypatch):
    job, folder = in_a_chain
    batches = [batch for batch in batches_of(job.plan.tensors, together=True) if batch[0].quantize]
    assert max(map(len, batches)) > 1
    transfers, original = [], torch.Tensor.cpu

    def counted(tensor, *arguments):
        if threading.current_thread() is threading.main_thread():  # others write what was found
            transfers.append(tensor.numel())
        return original(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    report = run(job, folder / "out")
    assert len(transfers) == len(batches)
    assert all(tensor.root is not None for tensor in report.tensors)
    sums = 4 * 10 + 4 + 2 * 13 * 3  # of four sides, of the alphas, of outcomes by the size of the change
    scores = {tensor.name: len(tensor.curve.score) + 1 for tensor in report.tensors if tensor.curve}
    of_curves = [sum(scores.get(pair.spec.name, 0) for pair in batch) for batch in batches]
    assert transfers == [sums * len(batch) + more for batch, more in zip(batches, of_curves, strict=True)]
    read = load_checkpoint(folder / "out", dtype=torch.float32)
    for tensor in report.tensors:  # each has its own
        exact = measure(job.source.weights[tensor.name], job.base[tensor.name], read[tensor.name])
        for one, two in zip(tensor.searched, exact, strict=True):
            assert one.dtype == two.dtype
            assert float(one) == pytest.approx(float(two), rel=1e-5)
