"""The page of a report: what it says, that it needs nothing else, and that foreign names do no harm."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import tiny_models
import torch

from daq_lightning import ExportReport, export_checkpoint
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.cli import main
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.report.figures import TensorReport, figures
from daq_lightning.report.html import MARK, page, save_page
from daq_lightning.report.levels import percent, worst_rows
from daq_lightning.report.names import split_name
from daq_lightning.report.rows import figures_of, rows_of, totals_of
from daq_lightning.report.sections import COLUMNS
from daq_lightning.report.verdict import ignore_options, judge, reason_of

PROJECTIONS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
]
SEARCH = {
    "metric": "hybrid", "alpha_min": 0.5, "alpha_max": 2.0, "n_coarse": 5, "n_fine": 10,
    "alpha_scope": "group", "tau": 0.01, "spacing": "linear",
}  # fmt: skip
VOID = {"meta", "wbr"}


def stats(gain, *, delta_sq=1.0, noise=1.5, n=10_000, lost=0.05, flipped=0.1):
    """Sums of an update of which `gain` is left, with orthogonal noise of `noise` times its norm."""
    n_changed = n * 9 // 10 if delta_sq else 0
    gone, turned = int(n_changed * lost), int(n_changed * flipped)
    preserved = n_changed - gone - turned
    dot = gain * delta_sq
    across = noise**2 * (delta_sq or 1.0)
    sums = (dot, delta_sq, gain**2 * delta_sq + across, (gain - 1) ** 2 * delta_sq + across)
    counts = (n, n_changed, preserved + (n - n_changed) // 3, preserved, turned, gone)
    return DeltaStats(
        *map(torch.tensor, counts), *(torch.tensor(value, dtype=torch.float64) for value in sums)
    )


def weight(name, gain=0.99, *, plain=0.4, read=0.97, without_base="", **changes):
    return TensorReport(
        name=name,
        shape=(100, 100),
        dtype="bfloat16",
        scheme="FP8_BLOCK",
        alpha={"min": 0.51, "mean": 1.03, "max": 1.98, "moved": 0.9},
        searched=stats(gain, **changes),
        absmax=stats(plain, **changes),
        dequantized=None if read is None else stats(read, **changes),
        without_base=without_base,
    )


def report_of(*tensors, **changes):
    return ExportReport(
        path="/secret/place/fp8", scheme="FP8_BLOCK", search=SEARCH, tensors=tensors, **changes
    )


def model(layers, projections=PROJECTIONS, gain=lambda layer, projection: 0.99, **changes):
    return report_of(
        *(
            weight(f"model.layers.{layer}.{projection}.weight", gain(layer, projection))
            for layer in range(layers)
            for projection in projections
        ),
        **changes,
    )


class Page(HTMLParser):
    """A page, taken apart; every element has to be closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def data(self, end):
        (link,) = (found for tag, found in self.tags if tag == "a" and found["download"].endswith(end))
        return base64.b64decode(link["href"].partition("base64,")[2]).decode()

    @property
    def figures(self):
        """Rows of the table of all figures: title -> cell."""
        table = next(table for table in self.tables if table[0][0] == "weight")
        return [dict(zip(table[0], line, strict=True)) for line in table[1:]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    base, post = tiny_models.make_pair(folder, tiny_models.llama, size=0.002)
    export_checkpoint(post, base, folder / "fp8")
    return folder / "fp8"


def test_figures_of_the_page_are_those_of_the_report(exported):
    report = ExportReport.load(exported)
    parsed = Page(page(report, Manifest.load(exported)))
    shown = {row["weight"]: row for row in parsed.figures}
    assert set(shown) == {tensor.name for tensor in report.tensors}
    served = [float(row["served"].rstrip(" %")) for row in parsed.figures]
    assert served == sorted(served)
    for tensor in report.tensors:
        row, now, plain = shown[tensor.name], figures(tensor.searched), figures(tensor.absmax)
        for key in ("gain", "cosine", "sign_rate"):
            title = key.replace("_", " ")
            assert (row[title], row[f"plain {title}"]) == (f"{now[key]:.4f}", f"{plain[key]:.4f}")
        assert row["served"] == percent(max(0, 1 - abs(now["gain"] - 1)))
        assert row["change RMS"] == f"{now['delta_norm'] / math.sqrt(128 * row_count(tensor)):.2e}"
        assert row["error RMS"] == f"{math.sqrt(now['mse']):.2e}"
        assert [row[f"alpha {key}"] for key in ("min", "mean", "max")] == [
            f"{tensor.alpha[key]:.4f}" for key in ("min", "mean", "max")
        ]
    content = json.loads(parsed.data("json"))
    assert content["totals"]["searched"]["gain"] == report.metrics()["gain"]
    assert content["totals"]["absmax"]["cosine"] == report.metrics("absmax")["cosine"]
    assert content["versions"]["torch"] == version("torch")
    lines = list(csv.DictReader(io.StringIO(parsed.data("csv"))))
    gains = {line["name"]: float(line["gain"]) for line in lines}
    assert gains == {tensor.name: figures(tensor.searched)["gain"] for tensor in report.tensors}
    text = "".join(parsed.texts)
    assert all(kept in text for kept in ("lm_head.weight", "kept: output head"))


def row_count(tensor):
    return tensor.shape[0] * tensor.shape[1] // 128


def test_the_page_needs_nothing_else_and_says_nothing_of_the_place(exported):
    text = page(ExportReport.load(exported), Manifest.load(exported))
    parsed = Page(text)
    assert not re.search(r"https?:|src\s*=|url\s*\(|@import|//[a-z]|\bstyle=|\bon[a-z]+=", text)
    links = [found["href"] for _, found in parsed.tags if "href" in found]
    assert len(links) == 2
    assert all(link.startswith("data:") for link in links)
    assert "default-src 'none'" in text
    assert str(exported.parent) not in text
    assert text == page(ExportReport.load(exported), Manifest.load(exported))


def test_the_table_sorts_by_buttons_and_everything_has_a_name():
    parsed = Page(page(model(4)))
    assert sum(tag == "button" for tag, _ in parsed.tags) == len(COLUMNS) + 2
    assert [found["aria-sort"] for _, found in parsed.tags if "aria-sort" in found] == ["ascending"]
    regions = [found for _, found in parsed.tags if found.get("role") == "region"]
    assert all(found["tabindex"] == "0" and found["aria-label"] for found in regions)
    assert all(found["aria-label"] for tag, found in parsed.tags if tag == "svg")


@pytest.mark.parametrize(
    ("projections", "tensors", "rows"),
    [(PROJECTIONS, 7, 7), ([*PROJECTIONS[:4], *(f"mlp.experts.{e}.down_proj" for e in range(64))], 68, 5)],
    ids=["dense", "experts"],
)
def test_a_page_of_32_layers_is_small(projections, tensors, rows):
    report = model(32, projections)
    assert len(report.tensors) == 32 * tensors
    text = page(report)
    assert len(text.encode()) < 1_500_000
    assert len(Page(text).figures) == 32 * rows


@pytest.mark.parametrize(
    ("gains", "served", "level", "said"),
    [
        (
            (1.0, 1.0),
            1.0,
            "good",
            "100.0 % of what training changed is served; worst: layers.0.a (100.0 %). Nothing",
        ),
        ((0.9, 0.9), 0.9, "fair", "90.0 % of what training changed is served"),
        ((1.9, 1.9), 0.1, "bad", "served 1.90 times as strong, 10.0 % is right"),
        ((2.5, 2.5), 0.0, "bad", "served 2.50 times as strong, 0.0 % is right"),
        ((-0.5, -0.5), 0.0, "bad", "0.0 % of what training changed is served"),
        ((1.5, 0.5), 0.5, "bad", "50.0 % of what training changed is served at its strength"),
        ((1.6, 0.5), 0.45, "bad", "45.0 % of what training changed is served at its strength, some of it is"),
    ],
)
def test_served_is_what_survives_at_its_strength(gains, served, level, said):
    report = report_of(*(weight(f"layers.{at}.a.weight", gain) for at, gain in enumerate(gains)))
    totals = totals_of(report)
    assert totals["searched"].served == pytest.approx(served)
    verdict = judge(report, rows_of(report), totals)
    assert said in verdict.headline
    assert verdict.level == level
    assert bool(verdict.advice) == (level == "bad")


def test_one_lost_layer_is_not_hidden_by_a_good_total():
    report = model(
        32, gain=lambda layer, projection: 0.3 if (layer, projection) == (0, "mlp.down_proj") else 0.99
    )
    verdict = judge(report, rows_of(report), totals_of(report))
    assert verdict.level == "fair"
    assert verdict.headline.endswith("worst: model.layers.0.mlp.down_proj (30.0 %).")
    assert verdict.advice[0] == "Keep it in 16 bit: --ignore model.layers.0.mlp.down_proj"
    whole = model(32)
    assert judge(whole, rows_of(whole), totals_of(whole)).advice == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "cosine"}, "--metric hybrid"),
        ({"alpha_scope": "layer"}, "--alpha-scope group"),
        ({"alpha_min": 0.9, "alpha_max": 1.11}, "--range 0.5 2.0"),
        ({"alpha_min": 1.0, "alpha_max": 1.0}, "leave --range out"),
        ({}, "--ignore"),
    ],
)
def test_what_to_do_fits_how_it_was_searched(change, said):
    report = dataclasses.replace(model(8, gain=lambda *_: 0.5), search=SEARCH | change)
    assert said in judge(report, rows_of(report), totals_of(report)).advice[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.layers.0.self_attn.k_proj.weight", [f"m.layers.0.self_attn.{kind}_proj" for kind in "qkv"]),
        ("m.layers.0.mlp.down_proj.weight", ["m.layers.0.mlp.down_proj"]),
    ],
)
def test_what_servers_join_is_ignored_together(name, expected):
    report = report_of(*(weight(f"m.layers.0.{projection}.weight") for projection in PROJECTIONS))
    row = next(row for row in rows_of(report) if row.name == name)
    options = ignore_options(row, [tensor.name for tensor in report.tensors])
    assert options == " ".join(f"--ignore {module}" for module in expected)


def test_experts_are_one_row_and_are_ignored_together():
    names = [
        f"m.layers.1.mlp.experts.{expert}.{kind}_proj.weight" for expert in (0, 1) for kind in ("up", "down")
    ]
    report = report_of(*(weight(name, 0.2 if ".1.down" in name else 0.9, delta_sq=2.0) for name in names))
    up, down = rows_of(report)
    assert down.name == "m.layers.1.mlp.experts.*.down_proj"
    assert down.worst_name == names[3]
    assert down.searched == figures_of([report.tensors[1].searched, report.tensors[3].searched])
    assert down.searched.served == pytest.approx(0.55)
    assert (down.worst_served, down.poor, up.poor) == (pytest.approx(0.2), 1, 0)
    assert "1 of 4 weights are below 80 %" in page(report)
    options = ignore_options(down, names)
    pattern = re.search(r"'re:(.*)'", options)[1]
    assert all(re.fullmatch(pattern, name) for name in names)
    assert not re.fullmatch(pattern, "m.layers.11.mlp.experts.0.up_proj.weight")


def test_a_reason_is_what_the_sums_say():
    tensors = {
        "lost": weight("layers.0.a.weight", 0.2, lost=0.7),
        "flipped": weight("layers.0.b.weight", 0.9, flipped=0.4),
        "amplified": weight("layers.0.c.weight", 1.4),
        "none": weight("layers.0.d.weight", delta_sq=0.0),
        "foreign": weight("layers.0.e.weight", without_base="it is new"),
    }
    reasons = dict(zip(tensors, map(reason_of, rows_of(report_of(*tensors.values()))), strict=True))
    assert "70.0 % of its changes round back to the base" in reasons["lost"]
    assert "0.20 times as strong" in reasons["lost"]
    assert "come out on the other side" in reasons["flipped"]
    assert "amplified: its change is served 1.40 times" in reasons["amplified"]
    assert reasons["none"].startswith("no update")
    assert reasons["foreign"] == "not compared: it is new"


INJECTIONS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></script><svg onload=alert(1)>",
    "a\u202eb\x00\n\ud800",
    "=cmd|' /C calc'!A0",
]


@pytest.mark.parametrize("evil", INJECTIONS)
def test_names_do_no_harm(tmp_path, evil):
    tensors = [
        weight(f"layers.0.{evil}.weight", 0.3),
        weight(f"{evil}.weight", 0.3),
        weight(f"{evil}.1.x.weight"),
        weight(f"{evil}.2.x.weight"),
        weight(f"{evil}.3.x.weight"),
        weight("layers.0.new.weight", without_base=evil),
    ]
    report = report_of(*tensors, kept={evil: evil}, notes=(evil,))
    harmless = report_of(
        *(dataclasses.replace(tensor, name=tensor.name.replace(evil, "x")) for tensor in tensors[:5]),
        dataclasses.replace(tensors[5], without_base="x"),
        kept={"x": "x"},
        notes=("x",),
    )
    for changed in (report, dataclasses.replace(report, search=SEARCH | {evil: evil}, path=f"/{evil}")):
        save_page(changed, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text("utf-8")
        parsed = Page(text)
        scripts = [tag for tag, _ in parsed.tags if tag in ("script", "img", "style")]
        assert sorted(scripts) == ["script", "style"]
        assert not any(name.startswith("on") for _, found in parsed.tags for name in found)
        assert "\u202e" not in text
        lines = csv.reader(io.StringIO(parsed.data("csv")))
        assert not any(cell.startswith(("=", "@", "+")) for line in lines for cell in line)
    tags = [tag for tag, _ in Page(page(report)).tags if tag != "wbr"]
    assert tags == [tag for tag, _ in Page(page(harmless)).tags if tag != "wbr"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([weight("layers.0.a.weight", delta_sq=0.0)], "No weight changed"),
        ([weight("layers.0.a.weight", without_base="it is new")], "no weight has a base"),
        ([], "no weight has a base"),
        ([weight("a.weight", read=None)], "99.0 %"),
        (
            [weight("layers.0.a.weight", delta_sq=1e308), weight("layers.1.a.weight", delta_sq=1e308)],
            "too large",
        ),
        ([weight("layers.0.a.weight"), weight("layers.1.a.weight", delta_sq=0.0)], "99.0 %"),
    ],
    ids=["unchanged", "without base", "kept only", "no 16-bit reader", "infinite", "partly"],
)
def test_what_says_nothing_is_shown_as_nothing(tensors, said):
    report = report_of(*tensors, kept={"lm_head.weight": "kept: output head"})
    text = page(report)
    parsed = Page(text)
    assert said in "".join(parsed.texts)
    for lines in parsed.tables:
        assert not {"nan", "inf", "None"} & {cell for line in lines for cell in line}
    content = json.loads(parsed.data("json"), parse_constant=pytest.fail)
    assert len(content["rows"]) == len(tensors)


def test_worst_rows_are_those_with_an_update_lowest_first():
    report = report_of(
        weight("layers.0.a.weight", 0.9),
        weight("layers.1.a.weight", 1.3),
        weight("layers.2.a.weight", 0.1, without_base="it is new"),
        weight("layers.3.a.weight", delta_sq=0.0),
    )
    assert [row.layer for row in worst_rows(rows_of(report))] == ["layers.1", "layers.0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("visual.blocks.3.attn.qkv.weight", ("visual.blocks", "visual.blocks.3", "attn.qkv")),
        ("projector.0.weight", ("", "", "projector.0")),
        ("0.weight", ("", "", "0")),
        ("weight", ("", "", "weight")),
        ("layers.10.experts.3.7.w", ("layers", "layers.10", "experts.*.*.w")),
    ],
)
def test_names_are_split_at_the_first_number(name, expected):
    assert split_name(name) == expected


def test_the_command_writes_a_page_and_replaces_only_pages(exported, tmp_path, capsys):
    file = tmp_path / "report.html"
    for _ in range(2):
        assert main(["inspect", str(exported), "--html", str(file)]) == 0
        assert f"page: {file}" in capsys.readouterr().out
    assert file.read_text() == page(ExportReport.load(exported), Manifest.load(exported))
    assert MARK in file.read_text()[:400]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    file.write_text("<html>mine</html>")
    for place, said in {
        file: "no page of this command",
        tmp_path: "is a folder",
        "/dev/null": "is not a file",
        tmp_path / "nowhere" / "page.html": "there is no folder",
        exported / "page.html": "choose a place beside it",
    }.items():
        assert main(["inspect", str(exported), "--html", str(place)]) == 1
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.out == ""
    assert file.read_text() == "<html>mine</html>"


def test_a_page_of_figures_that_differ_says_so(exported, tmp_path, capsys):
    file, models = tmp_path / "report.html", ["--base", str(exported.parent / "post"), "--post"]
    command = [
        "inspect",
        str(exported),
        *models,
        str(exported.parent / "base"),
        "--html",
        str(file),
        "--json",
    ]
    assert main(command) == 3
    assert json.loads(capsys.readouterr().out)["differences"]
    assert "weights have other figures in daq_report.json" in file.read_text()
