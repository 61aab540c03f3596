"""`daq-lightning inspect`: what an export kept of the update, weight by weight."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from daq_lightning.cli.inputs import UsageError, checkpoint_of, export_folder, print_json, weights_of
from daq_lightning.cli.words import DONE, PROBLEMS

if TYPE_CHECKING:
    from jsonargparse import Namespace

_SHOWN = 5  # differing weights in the text


def inspect(options: Namespace) -> int:
    """Shows what an export kept of the update, weight by weight."""
    from daq_lightning.audit.recompute import differences, recompute
    from daq_lightning.checkpoint.manifest import Manifest
    from daq_lightning.report.figures import ExportReport
    from daq_lightning.report.html import check_page, save_page
    from daq_lightning.report.text import table, worst_first

    post, base = options.post, options.base
    if options.limit is not None and options.limit < 0:
        raise UsageError(f"--limit says how many weights to show, expected 0 or more, got {options.limit}.")
    if options.adapter is not None:
        post, base = post or base, base or post
    if (post is None) != (base is None) or (options.adapter is not None and post is None):
        raise UsageError(
            "--base and --post (or --base and --adapter) belong together: figures need all of them."
        )
    report = found = ExportReport.load(export_folder(options.out))
    manifest = None
    if options.html is not None:
        check_page(options.html)
        manifest = Manifest.load(options.out)
    if base is not None:
        progress = sys.stderr.isatty()
        found = recompute(
            report, weights_of(post, options.adapter), checkpoint_of(base, "--base"), progress=progress
        )
    differing = differences(report, found)
    if options.html is not None:
        differ = f"{len(differing)} weights have other figures in daq_report.json; these were computed again."
        notes = (*found.notes, differ) if differing else found.notes
        save_page(dataclasses.replace(found, notes=notes), options.html, manifest)
    if options.json:
        content = found.to_dict()
        names = [tensor.name for tensor in worst_first(found)][: options.limit]
        content["tensors"] = {name: content["tensors"][name] for name in names}
        print_json({"path": found.path, "recomputed": base is not None, "differences": differing, **content})
        return PROBLEMS if differing else DONE
    print(table(found, options.limit))
    if base is not None:
        print(
            f"computed again from the files: {len(report.tensors) - len(differing)} of {len(report.tensors)} "
            "weights agree with daq_report.json"
        )
    for name, sums in list(differing.items())[:_SHOWN]:
        print(
            f"DIFFERS {name}: {'; '.join(sums[:2])}"
            + (f"; and {len(sums) - 2} more" if len(sums) > 2 else "")
        )
    if differing:
        more = f"and {len(differing) - _SHOWN} more weights. " if len(differing) > _SHOWN else ""
        print(
            f"{more}The files were changed after the export, or base and post are not the models it was made "
            "from."
        )
    if options.html is not None:
        print(f"page: {options.html}")
    return PROBLEMS if differing else DONE
