"""A report as one HTML file for people: a verdict in words, the worst first, pictures, tables, data.

The file needs nothing else: style, script and pictures are in it, and its content security policy lets it
load nothing and run no other script than its own. It holds no time and no absolute path, so the same export
gives the same page.

    save_page(ExportReport.load("fp8"), "report.html", Manifest.load("fp8"))
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.checkpoint.folder import MANIFEST, PAGE
from daq_lightning.report.charts import curve_charts, step_charts
from daq_lightning.report.figures import ExportReport, Side
from daq_lightning.report.levels import worst_rows
from daq_lightning.report.markup import items, name, scrolling, sentence, text, visible
from daq_lightning.report.names import split_name
from daq_lightning.report.rows import Figures, Row, rows_of, totals_of
from daq_lightning.report.sections import (
    COLUMNS,
    depth_charts,
    figure_table,
    heat_maps,
    validation_table,
    worst_list,
)
from daq_lightning.report.verdict import Verdict, judge, reason_of

if TYPE_CHECKING:
    from daq_lightning.checkpoint.manifest import Manifest

MARK = '<meta name="generator" content="daq-lightning report">'
"""By this a page is known, and may be replaced."""
_MOST_LINES = 200  # of the lists of notes and of weights that are not quantized


def save_page(report: ExportReport, file: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
    """Writes a report as a page, whole or not at all.

    Args:
        report: The report.
        file: Where to; an earlier page there is replaced.
        manifest: Of the same export: adds versions and origin.

    Raises:
        ValueError: There is something else, or the place is in an export.
        OSError: It cannot be written.
    """
    check_page(file)
    file = Path(file)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(page(report, manifest), "utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def check_page(file: str | os.PathLike[str]) -> None:
    """Refuses a place for a page that holds something else, or that is in an export.

    A file that its manifest does not list would keep an export from being replaced by the next one.

    Raises:
        ValueError: So it is; the message says what to do.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: pass the name of an HTML file.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {file.absolute().parent}.")
    if (file.absolute().parent / MANIFEST).exists():
        raise ValueError(
            f"{file} is in an export, which has a {PAGE} of its own and would no longer be what its "
            f"{MANIFEST} says: choose a place beside it."
        )
    if file.exists():
        if not file.is_file():
            raise ValueError(f"{file} is not a file: pass the name of an HTML file.")
        with file.open("rb") as stream:
            if MARK.encode() not in stream.read(400):
                raise ValueError(f"{file} exists and is no page of this command: choose another name.")


def page(report: ExportReport, manifest: Manifest | None = None) -> str:
    """A report as the text of an HTML file.

    Args:
        report: The report. One without a path gives a page without the folder's name.
        manifest: Of the same export: adds versions and origin.

    Example:
        >>> page(ExportReport(path="fp8", scheme="FP8_BLOCK", search={}, tensors=()))[:15]
        '<!doctype html>'
    """
    rows = rows_of(report)
    totals = totals_of(report)
    verdict = judge(report, rows, totals)
    worst = worst_rows(rows)
    ordered = [*worst, *(row for row in rows if not row.measured)]
    stacks: dict[str, list[Row]] = {}
    for row in rows:
        if row.layer:
            stacks.setdefault(split_name(row.names[0])[0], []).append(row)
    total_sq = sum(row.searched.delta_sq for row in worst)
    called = f"DAQ report: {Path(os.path.abspath(report.path)).name}" if report.path else "DAQ report"
    style, script = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    sections = [
        ("Validated as it will be served", validation_table(report.validation)),
        ("What to look at first", worst_list(worst, total_sq, reason_of)),
        ("By depth", depth_charts(list(stacks.items()))),
        ("Layer by projection", heat_maps(list(stacks.items()))),
        ("By size of the change", step_charts(report)),
        ("Objective over alpha", curve_charts(report)),
        (
            "All figures",
            _downloads(report, totals, verdict, rows, manifest) + figure_table(ordered, reason_of),
        ),
        ("Not quantized, not compared, noted", _left_out(report)),
        ("How it was made", _settings(report, manifest)),
        ("What the words mean", _WORDS + items(_columns())),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(called)}</title><style>{style}</style></head><body>"
        f"<header><h1>{text(called)}</h1>{_verdict(report, verdict)}</header>"
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _verdict(report: ExportReport, verdict: Verdict) -> str:
    advice = items(map(sentence, verdict.advice))
    todo = f"<p>What to do:</p>{advice}" if advice else ""
    left = f"{len(report.kept):,} tensors are not quantized"
    count = f"{len(report.tensors):,} weights as {report.scheme}; {left}."
    details = "".join(f"<p>{text(line)}</p>" for line in (*verdict.details, count))
    return (
        f'<div class="verdict {verdict.level}"><p class="headline">{sentence(verdict.headline)}</p>{todo}'
        f"</div>{details}"
    )


def _left_out(report: ExportReport) -> str:
    """What was kept, what fell back to plain scales, and the notes; names with `*` for their numbers."""
    groups: dict[tuple[str, str], list[str]] = {}
    for weight, reason in report.kept.items():
        groups.setdefault((reason, _pattern(weight)), []).append(weight)
    for tensor in report.tensors:
        if tensor.without_base:
            why = f"plain scale, not compared: {tensor.without_base}"
            groups.setdefault((why, _pattern(tensor.name)), []).append(tensor.name)
    lines = [
        f"<tr><td>{name(names[0] if len(names) == 1 else pattern)}</td><td>{len(names):,}</td>"
        f"<td>{text(reason)}</td></tr>"
        for (reason, pattern), names in groups.items()
    ]
    more = f"<p>and {len(lines) - _MOST_LINES:,} more lines in daq_report.json.</p>"
    table = (
        '<table><thead><tr><th scope="col">tensor</th><th scope="col">count</th><th scope="col">why</th></tr>'
        f"</thead><tbody>{''.join(lines[:_MOST_LINES])}</tbody></table>{more * (len(lines) > _MOST_LINES)}"
    )
    without = {f"{tensor.name}: plain absmax scale" for tensor in report.tensors if tensor.without_base}
    notes = [note for note in report.notes if note.partition(", because ")[0] not in without]
    shown = [text(note) for note in notes[:_MOST_LINES]]
    if len(notes) > _MOST_LINES:
        shown.append(f"and {len(notes) - _MOST_LINES:,} more in daq_report.json")
    return (
        scrolling(table, "Not quantized") if lines else "<p>Every tensor was quantized and compared.</p>"
    ) + items(shown)


def _settings(report: ExportReport, manifest: Manifest | None) -> str:
    """Settings and versions, as far as they are known."""
    known: dict[str, Any] = {"scheme": report.scheme, "dtype of kept tensors": report.dtype}
    known |= {f"search: {key}": value for key, value in report.search.items()}
    if report.kv_cache is not None:
        known["KV cache"] = report.kv_cache.words()
    if manifest is not None:
        settings = {key: value for key, value in manifest.settings.items() if key != "search"}
        known |= settings | {"container": manifest.quantization_config.get("quant_method")}
        known |= {f"version of {key}": value for key, value in manifest.versions.items()}
        known |= {f"training: {key}": value for key, value in manifest.training.items()}
        lineage = {key: value for key, value in vars(manifest.lineage).items() if value not in ("", None)}
        known |= lineage | {"fingerprint of the manifest": manifest.fingerprint}
    lines = "".join(
        f'<tr><th scope="row">{text(key.replace("_", " "))}</th><td>{text(_plain(value))}</td></tr>'
        for key, value in known.items()
    )
    return scrolling(f"<table>{lines}</table>", "Settings")


def _downloads(
    report: ExportReport,
    totals: Mapping[Side, Figures],
    verdict: Verdict,
    rows: Sequence[Row],
    manifest: Manifest | None,
) -> str:
    """Links that hold the data of the page."""
    content = {
        "verdict": {"level": verdict.level, "headline": verdict.headline, "advice": list(verdict.advice)},
        "scheme": report.scheme,
        "search": dict(report.search),
        "versions": dict(manifest.versions) if manifest is not None else {},
        "totals": {side: vars(figures) for side, figures in totals.items()},
        "rows": [row.to_dict() for row in rows],
    }
    data = {"json": ("application/json", json.dumps(content)), "csv": ("text/csv", _csv(rows))}
    links = " ".join(
        f'<a class="button" download="daq_report_rows.{end}" href="data:{kind};base64,'
        f'{base64.b64encode(inside.encode()).decode()}">Download {end.upper()}</a>'
        for end, (kind, inside) in data.items()
    )
    return f"<p>{links}</p><p>Press a title to sort by it.</p>"


def _csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["name", "weights", *(column.title for column in COLUMNS), "why"])
    for row in rows:
        writer.writerow(
            [
                _cell(row.name),
                len(row.names),
                *(column.value(row) for column in COLUMNS),
                _cell(reason_of(row)),
            ]
        )
    return stream.getvalue()


def _cell(value: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    shown = visible(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _columns() -> list[str]:
    return [f"<strong>{text(column.title)}</strong>: {text(column.about)}." for column in COLUMNS]


def _pattern(weight: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", weight)


def _plain(value: object) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value) if value else "none"
    return "none" if value is None else str(value)


def _file(called: str) -> str:
    """A file that lies beside this one in the package."""
    content = pkgutil.get_data(__package__ or "", called)
    assert content is not None
    return content.decode()


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


_WORDS = """<p>The <em>update</em> is what training changed: the weight after minus the weight before. What
is <em>served</em> of it is the part along its own direction, at its strength: a gain of 1 serves 100 %, 0.4
serves 40 %, and 1.3 serves 70 %, since it is 30 % too strong. Over several weights it is the mean by the
squared size of their updates. <em>Error</em> is what rounding adds to a weight, most of it in no direction in
particular. <em>Plain</em> scales are those that the largest weight of a block or row sets (absmax). A
<em>step</em> is the distance between two neighbours that the format can hold; where a change is below half of
it and the base lies on a step, the change is lost. Good is 95 % and more, bad is below 80 %: bounds of this
page. A pattern with * stands for several weights, whose sums are added.</p>"""
