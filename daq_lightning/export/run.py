"""From a job to a quantized checkpoint: the one way a weight takes.

    Pair(plan, weight, base) -> search, rounding -> codes, scale -> file
                                                 -> sums         -> report

Weights are read, searched and written one batch at a time: while one is searched, the next is read and the
last is written by threads of their own. Nothing here knows whether a mapping is a folder, a model on a GPU or
a merge of adapters. Several ranks do the same, each with the files that are its own; what was measured and
printed by all is collected at the end, and rank 0 publishes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.destination import check_destination, check_inputs
from daq_lightning.checkpoint.folder import CARD, MANIFEST, PAGE, RECIPE, REPORT
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.writer import CheckpointWriter, plan_shards
from daq_lightning.export.account import batch_reports, config_of, notes_of
from daq_lightning.export.behind import Behind
from daq_lightning.export.card import existing_card, make_card, make_recipe
from daq_lightning.export.checks import check_finite
from daq_lightning.export.curvature import with_curvature
from daq_lightning.export.disk import bytes_of, check_room
from daq_lightning.export.finished import (
    Finished,
    Records,
    TensorPrints,
    find_leftover,
    interrupted,
    prints_of,
)
from daq_lightning.export.kv_cache import check_found, kept_reasons, report_of
from daq_lightning.export.manifest import make_manifest
from daq_lightning.export.memory import Room, batches_fit, check_memory, needed
from daq_lightning.export.ranks import ALONE, Agreement, RankLostError, Ranks
from daq_lightning.export.rounding import choose_codes
from daq_lightning.export.sampled import curve_names, look
from daq_lightning.export.scales import search_scales
from daq_lightning.export.stream import Batch, Pair, stream
from daq_lightning.export.timings import Timings
from daq_lightning.export.work import Work, open_on_all, share_out
from daq_lightning.numerics.search.stages import SearchResult
from daq_lightning.report.figures import ExportReport
from daq_lightning.report.html import page

Judge: TypeAlias = Callable[[Path, Collection[str], ExportReport], ExportReport]

if TYPE_CHECKING:
    from daq_lightning.checkpoint.tensor_file import TensorSpec
    from daq_lightning.export.job import Job
    from daq_lightning.export.plan import TensorPlan


def run(
    job: Job,
    out: Path,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    resume: bool = False,
    judge: Judge | None = None,
    timings: Timings | None = None,
    elsewhere: bool = False,
) -> ExportReport:
    """Writes the checkpoint of a job.

    Args:
        job: What `prepare` settled, the same on all ranks.
        out: Destination folder. An earlier export there is replaced on success; anything else is refused.
        device: Where to search; None searches where each weight lies.
        progress: Whether to show how far it is, on rank 0.
        ranks: The processes that share the work; all of them call this.
        resume: Whether to go on from the files that an export to the same place, which was killed, had
            completed; and to leave them there if this one is cut off too. Only between folders.
        judge: Called on all ranks when the files are written and not yet published, with their folder and
            names and the report; returns the report to publish. If it raises, nothing is published.
        timings: A clock to be told how long it took, on all ranks or on none.
        elsewhere: Whether it will be uploaded, so that paths from its folder mean nothing.

    Returns:
        The report, also written as `daq_report.json` and `daq_report.html`; the same on every rank.

    Raises:
        CheckpointError: A tensor cannot be read, the destination cannot be written, the ranks do not see the
            same files or do not plan the same, or one of them is gone.
        ValueError: NaN or Inf in a weight, by name.
        InterruptedExportError: An interrupt, after some files were complete; they stay.
    """
    clock = Timings() if timings is None else timings
    ranks.together(lambda: None)  # until rank 0 has removed what an export before this one left
    ranks.together(
        lambda: (
            check_found(job.settings, job.cache),
            check_inputs(out, job.inputs()),
            check_destination(out),
            existing_card(job),
        )
    )
    shards = plan_shards(job.plan.stored_together, job.settings.max_shard_bytes)
    ranks.first(lambda: check_room(out, bytes_of(shards), elsewhere=elsewhere))
    records = Records(job)
    found = ranks.first(lambda: find_leftover(out, records) if resume else None)
    done = Finished() if found is None else _verified(found, records, job, shards, ranks)
    shared = partial(share_out, job.plan, shards, ranks, complete=done.files)
    work = shared(together=job.settings.search.alpha_scope == "group")
    if not all(ranks.gather(batches_fit(job, work, ranks.rank))):
        work = shared(together=False)
    ranks.together(lambda: check_memory(job, work, ranks.rank))
    with contextlib.ExitStack() as stack:
        job = with_curvature(job, work, ranks, stack, device=device, progress=progress)
        writer = open_on_all(
            lambda folder: CheckpointWriter(
                out,
                job.plan.stored_together,
                job.settings.max_shard_bytes,
                files=work.files(ranks.rank),
                folder=folder,
                resume=found,
            ),
            ranks,
            stack,
        )
        writer.keep = resume and records.possible
        try:
            mine = _write_tensors(
                job, work, writer, records, ranks, device=device, progress=progress, clock=clock
            )
            parts = [mine] if ranks.size == 1 else map(Finished.from_dict, ranks.gather(mine.to_dict()))
            every = Finished.joined([done, *parts])
        except RankLostError:
            writer.keep = records.possible
            raise
        except KeyboardInterrupt as error:
            told = interrupted(records, writer.folder, len(shards))
            if told is None:
                raise
            writer.keep = True
            raise told from error
        except Exception as error:
            ranks.wait_after(error)  # until nobody writes into the folder that is removed now
            raise
        report = ExportReport(
            path=str(out),
            scheme=job.plan.layouts.scheme,
            search=dataclasses.asdict(job.settings.scale_search),
            tensors=tuple(every.reports[tensor.spec.name] for tensor in job.plan.quantized),
            kept=kept_reasons(job.plan),
            notes=(*job.plan.notes, *notes_of(job, every.reports)),
            dtype=str(job.plan.dtype).removeprefix("torch."),
            kv_cache=report_of(job.plan, job.cache),
            placement=job.placement,
        )
        if judge is not None:
            report = judge(writer.folder, tuple(shards), report)
        here = None if elsewhere else out
        ranks.together(lambda: _publish(job, writer, report, every.prints, here) if ranks.rank == 0 else None)
    if timings is not None:
        ranks.together(lambda: timings.weigh(out) if ranks.rank == 0 else None)
        timings.collect(ranks)
    return report


def _verified(
    folder: Path, records: Records, job: Job, shards: Mapping[str, Sequence[TensorSpec]], ranks: Ranks
) -> Finished:
    """What is complete in a leftover; the ranks share the reading."""
    files = sorted(shards)[ranks.rank :: ranks.size]
    found = ranks.together(lambda: [records.read(folder, file, shards[file]) for file in files])
    return Finished.joined([part for parts in ranks.gather(found) for part in parts])


def _write_tensors(
    job: Job,
    work: Work,
    writer: CheckpointWriter,
    records: Records,
    ranks: Ranks,
    *,
    device: str | torch.device | None,
    progress: bool,
    clock: Timings,
) -> Finished:
    """Searches and writes what is dealt to this rank, in step with the others."""
    mine, curves = Finished(), curve_names(job)
    agreement, room = Agreement(ranks), Room(job.max_memory)
    files = {file: records.of(file, writer.shards[file]) for file in work.files(ranks.rank)}
    with (
        Behind() as behind,
        contextlib.closing(
            stream(job, work, ranks, agreement, device=device, progress=progress, room=room)
        ) as batches,
    ):

        def write(plan: TensorPlan, stored: Mapping[str, Tensor], prints: TensorPrints) -> None:
            for part, tensor in stored.items():
                writer.write(plan.stored[part].name, tensor)
            mine.prints[plan.spec.name] = prints
            for file, record in files.items():
                if record.completed_by(plan.spec.name):
                    writer.sync(file)
                    writer.write_json(*record.content(mine))

        def finish(pair: Pair, result: SearchResult) -> None:
            stored = pair.plan.layout.pack(
                result.codes, result.scale, zero=result.zero, global_scale=result.global_scale
            )
            write(pair.plan, stored, prints_of(stored, pair.weight, pair.base))

        def finish_kept(plan: TensorPlan, stored: Mapping[str, Tensor]) -> None:
            write(plan, stored, prints_of(stored))

        def export(batch: Batch) -> None:
            """Afterwards only what is to be written is held."""
            if not batch[0].plan.quantize:
                [(plan, tensor, _)] = batch
                check_finite(tensor, plan.spec.name)
                behind.run(finish_kept, plan, {KEPT: tensor.to(plan.stored[KEPT].dtype)})
                return
            with clock.searching():
                chosen = choose_codes(job, batch, partial(search_scales, job))
            samples = look(job, batch, [one.result for one in chosen], curves)
            reports = batch_reports(job, batch, chosen, samples)
            for pair, report, one in zip(batch, reports, chosen, strict=True):
                mine.reports[pair.plan.spec.name] = report
                behind.run(finish, pair, one.result)

        for batch in batches:
            with agreement.attempt():
                export(batch)
            done = room.giver(needed(job, [pair.plan for pair in batch]) if room.limit else 0)
            del batch
            behind.then(done)
        with agreement.attempt():
            behind.wait()
            writer.finish()
        agreement.end()
    return mine


def _publish(
    job: Job,
    writer: CheckpointWriter,
    report: ExportReport,
    prints: Mapping[str, TensorPrints],
    out: Path | None,
) -> None:
    """Everything but the tensors, the manifest last; then the folder gets its name."""
    Records.remove(writer.folder)
    writer.add_files(job.source.copy_files)
    if job.source.config is not None:
        writer.write_json("config.json", config_of(job))
    writer.write_json(REPORT, report.to_dict())
    # without the folder's name, and before there is a manifest: the same weights give the same page anywhere
    writer.add_text(PAGE, page(dataclasses.replace(report, path="")), "backslashreplace")
    recipe = make_recipe(job, writer.folder, out)
    if recipe:
        writer.add_text(RECIPE, recipe)
    writer.add_text(CARD, make_card(job, report, bool(recipe)))
    writer.write_json(MANIFEST, make_manifest(job, prints, writer.folder, out).to_dict())
    writer.publish()
