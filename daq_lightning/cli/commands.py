"""What each subcommand does with its options, and the words in which it says so; each returns the exit code.

A command imports what it needs itself: `chain` of a folder does not wait for the search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.cli.inputs import (
    UsageError,
    checkpoint_of,
    model_folder,
    print_json,
)
from daq_lightning.cli.words import DONE, PROBLEMS, REFUSED

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from daq_lightning.checkpoint.reader import Checkpoint
    from daq_lightning.export.job import Job

_SHOWN = 5  # problems that are named


def quantize(options: Namespace) -> int:
    """Writes a quantized checkpoint, or shows what would be written."""
    from daq_lightning.checkpoint.budget import memory_of
    from daq_lightning.cli.ranks import all_ranks, device_of_rank
    from daq_lightning.export.calibration import Calibration
    from daq_lightning.export.checks import check_device
    from daq_lightning.export.job import prepare
    from daq_lightning.export.kv_text import calibrated_on, check_text
    from daq_lightning.export.mixed import within_budget
    from daq_lightning.export.place import opened as opened_place
    from daq_lightning.export.run import run
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source
    from daq_lightning.model.hub import is_repository
    from daq_lightning.numerics.search.settings import ScaleSearch

    if options.base is None and options.adapter is None:
        raise UsageError("--base is missing: pass the folder of the model that POST was trained from.")
    if options.out is None and not options.dry_run:
        raise UsageError(
            "--out is missing: pass the folder to write, or --dry-run to see what would be written."
        )
    if options.parent is not None and options.chain_from is None:
        raise UsageError(
            f"--parent {options.parent}: say what this stage was trained from with --chain-from deployed "
            "(the parent's dequantized FP8 weights) or --chain-from weights (the high-precision weights it "
            "was made from)."
        )
    try:
        choices = ExportSettings(
            scheme=options.scheme,
            search=ScaleSearch(
                metric=options.metric,
                alpha_min=options.range[0],
                alpha_max=options.range[1],
                n_coarse=options.n_coarse,
                n_fine=options.n_fine,
                alpha_scope=options.alpha_scope,
                tau=options.tau,
                spacing=options.spacing,
            ),
            rounding=options.rounding,
            ignore=tuple(options.ignore),
            container=options.container,
            scale_format=options.scale_format,
            kv_cache=options.kv_cache,
            missing_base=options.missing_base,
            max_shard_bytes=options.max_shard_bytes,
            budget=options.budget,
            ladder=tuple(options.ladder),
        )
        check_text(options.kv_cache, options.kv_text)
        most = None if options.max_memory is None else memory_of(options.max_memory)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if options.calibrate is None and options.calibrate_sha256 is not None:
        raise UsageError("--calibrate-sha256 is that of a text, but --calibrate is missing.")
    if options.push_to_hub is not None and not is_repository(options.push_to_hub):
        raise UsageError(f"--push-to-hub expects ORG/NAME, got {options.push_to_hub}.")
    device = device_of_rank(options.device)
    with all_ranks() as ranks, contextlib.ExitStack() as stack:

        def opened() -> tuple[Source, Checkpoint, Calibration | None]:
            check_device(device)
            adapter = None if options.adapter is None else model_folder(options.adapter, "--adapter")
            source = Source.from_folder(model_folder(options.post, "POST"), adapter)
            base = checkpoint_of(options.base or options.post, "--base")
            if options.calibrate is None:
                return source, base, None
            return source, base, Calibration.of(options.calibrate, source, choices, options.calibrate_sha256)

        source, base, calibration = ranks.together(opened)
        job = prepare(
            source,
            base,
            choices,
            parent=options.parent,
            chain_from=options.chain_from,
            ranks=ranks,
            calibration=calibration,
            max_memory=most,
        )
        if options.dry_run:
            if options.out is not None and choices.budget is not None:  # before an hour of measuring
                ranks.first(lambda: _check_out(job, options))
            job = within_budget(job, stack=stack, device=device, progress=not options.quiet, ranks=ranks)
            return _show_plan(job, options) if ranks.rank == 0 else DONE

        with opened_place(str(options.out), ranks, job) as place:  # before an hour of measuring
            job = within_budget(job, stack=stack, device=device, progress=not options.quiet, ranks=ranks)
            job = calibrated_on(job, options.kv_text, device=device, ranks=ranks)
            shown = {"device": device, "progress": not options.quiet}
            write = partial(run, job, ranks=ranks, resume=options.resume, **shown)
            report = place.export(job, write, resume=options.resume)
            if ranks.rank:
                return DONE
            if options.json:
                print_json({"path": report.path, **report.to_dict()})
            elif not options.quiet:
                print(report.summary())
            return DONE if options.push_to_hub is None else _push(place.folder, options)


def _push(folder: Path, options: Namespace) -> int:
    """Uploads an export that its readers will understand; one that fails stays where it is."""
    from daq_lightning.audit.verify import verify_checkpoint
    from daq_lightning.model.hub import HubError, push_folder

    problems = verify_checkpoint(folder)
    if problems:
        print(
            f"not uploaded, because `daq-lightning verify {folder}` finds: {'; '.join(problems[:_SHOWN])}",
            file=sys.stderr,
        )
        return PROBLEMS
    try:
        url = push_folder(folder, options.push_to_hub, private=options.private)
    except HubError as error:
        print(f"daq-lightning: error: {error}", file=sys.stderr)
        return REFUSED
    if not options.json and not options.quiet:
        print(f"uploaded: {url}")
    return DONE


def _show_plan(job: Job, options: Namespace) -> int:
    if options.out is not None:
        _check_out(job, options)
    placement = {} if job.placement is None else {"placement": job.placement.to_dict()}
    if options.json:
        print_json(job.plan.to_dict() | {"without_base": dict(job.without_base)} | placement)
        return DONE
    quantized, missing = len(job.plan.quantized), len(job.without_base)
    print(job.plan.table())
    base: Any = job.base
    print(f"base: {quantized - missing} of {quantized} weights to quantize are in {base.path}")
    print("".join(f"  {name}: plain scale, {why}\n" for name, why in job.without_base.items()), end="")
    if job.calibration is not None:
        print(f"calibration: {job.calibration.source}")
    if job.placement is not None:
        print("\n".join(job.placement.lines()))
    print("dry run: nothing was written" + ", all weights were measured" * (job.placement is not None))
    return DONE


def _check_out(job: Job, options: Namespace) -> None:
    from daq_lightning.checkpoint.destination import check_inputs
    from daq_lightning.checkpoint.urls import is_url
    from daq_lightning.export.place import check_place

    if not is_url(options.out):
        check_inputs(Path(options.out), job.inputs())
    check_place(options.out, write=False)


def chain(options: Namespace) -> int:
    """Shows the exports that led to one, and whether all are intact."""
    from daq_lightning.audit.chain import Chain
    from daq_lightning.checkpoint.folder import MANIFEST
    from daq_lightning.checkpoint.tensor_file import CheckpointError

    if not (Path(model_folder(options.folder, "FOLDER")) / MANIFEST).is_file():
        raise ValueError(f"{options.folder} has no {MANIFEST}, so it is not an export by this package.")
    stages, problems, text = [], [], ""
    try:
        chain = Chain.open(options.folder)
        problems += chain.verify()
        text = chain.table()
        for stage in chain.stages:
            described = {"folder": str(stage.folder.resolve()), "fingerprint": stage.manifest.fingerprint}
            stages.append(described | dataclasses.asdict(stage.manifest.lineage) | {"totals": stage.totals()})
    except CheckpointError as error:  # a manifest or report that was altered, or a stage that is gone
        problems.append(str(error))
    if options.json:
        print_json({"path": options.folder, "stages": stages, "problems": problems})
    else:
        verdict = [f"FAILED  {problem}" for problem in problems] or ["all is as it was exported"]
        print("\n".join([*filter(None, [text]), *verdict]))
    return PROBLEMS if problems else DONE


def verify(options: Namespace) -> int:
    """Checks a quantized folder against what its readers need."""
    from daq_lightning.audit.verify import checklist, run_checks
    from daq_lightning.checkpoint.urls import check_local

    check_local(options.out, "OUT")
    checks = run_checks(options.out)
    if options.json:
        print_json({"path": options.out, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        print(checklist(checks))
    return PROBLEMS if any(check.problems for check in checks) else DONE


def completion(options: Namespace) -> int:
    """Prints a script with which a shell completes the command."""
    try:
        import shtab  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("completion needs shtab: pip install 'daq-lightning[cli]'") from error
    if options.shell not in shtab.SUPPORTED_SHELLS:
        raise ImportError(f"this shtab does not know {options.shell}: pip install --upgrade shtab")
    from daq_lightning.cli.arguments import make_parser

    parser = make_parser()
    kinds = {"FOLDER": shtab.DIRECTORY, "POST": shtab.DIRECTORY, "OUT": shtab.DIRECTORY, "FILE": shtab.FILE}
    commands = parser._subcommands_action._name_parser_map  # type: ignore[union-attr]
    for action in (action for one in commands.values() for action in one._actions):
        if action.metavar in kinds:
            action.complete = kinds[action.metavar]
    script = shtab.complete(parser, options.shell)
    if options.json:
        print_json({"shell": options.shell, "script": script})
    else:
        print(script)
    return DONE
