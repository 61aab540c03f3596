"""What a reader that dequantizes sees, held against ml_dtypes in numpy."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from daq_lightning import ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.cli import main
from daq_lightning.numerics.objectives import DeltaStats

ROUND = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def oracle(weight, base, codes, scale, dtype):
    """The sums of a weight, by the definition, in float64."""
    code = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    cell = -(-code.shape[0] // scale.shape[0]), -(-code.shape[1] // scale.shape[1])
    full = np.kron(scale.numpy(), np.ones(cell, np.float32))[: code.shape[0], : code.shape[1]]
    seen = (code * full).astype(ROUND[dtype]).astype(np.float64)
    w, b = weight.double().numpy(), base.double().numpy()
    sign, sign_q = np.sign(w - b), np.sign(seen - b)
    return {
        "n": w.size,
        "n_changed": (sign != 0).sum(),
        "sign_equal": (sign == sign_q).sum(),
        "preserved": ((sign != 0) & (sign == sign_q)).sum(),
        "flipped": ((sign != 0) & (sign == -sign_q)).sum(),
        "lost": ((sign != 0) & (sign_q == 0)).sum(),
        "dot": ((w - b) * (seen - b)).sum(),
        "delta_sq": ((w - b) ** 2).sum(),
        "delta_q_sq": ((seen - b) ** 2).sum(),
        "error_sq": ((seen - w) ** 2).sum(),
    }


def assert_equal(stats, expected):
    assert set(expected) == set(DeltaStats._fields)
    for name, value in expected.items():
        assert float(getattr(stats, name)) == pytest.approx(float(value), rel=1e-5), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama, size=0.0005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_the_report_has_the_figures_of_a_reader_that_dequantizes(tmp_path, scheme, dtype):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.llama, dtype=dtype, size=0.0005)
    out = tmp_path / "out"
    returned = export_checkpoint(post, base, out, scheme=scheme)
    stored, weights, bases = (
        load_file(out / "model.safetensors"),
        load_checkpoint(post),
        load_checkpoint(base),
    )
    report = ExportReport.load(out)
    assert report.dtype == str(dtype).removeprefix("torch.")
    for tensor in report.tensors:
        scale = next(
            stored[tensor.name + end] for end in ("_scale", "_scale_inv") if tensor.name + end in stored
        )
        assert tensor.dequantized is not None
        expected = oracle(weights[tensor.name], bases[tensor.name], stored[tensor.name], scale, dtype)
        assert_equal(tensor.dequantized, expected)
    assert report.to_dict() == returned.to_dict() == json.loads((out / "daq_report.json").read_text())
    assert report.metrics("dequantized")["lost"] > report.metrics("searched")["lost"]


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_a_weight_whose_values_float16_cannot_hold_is_said_so_and_the_rest_is_measured(tmp_path, scheme):
    torch.manual_seed(0)
    weights = {name: torch.randn(256, 256).half() for name in ("a.weight", "b.weight")}
    weights["large.weight"] = 1e5 + torch.randn(128, 128)
    bases = {name: (1.001 * tensor.float()).to(tensor.dtype) for name, tensor in weights.items()}
    out = tmp_path / "out"
    report = export_checkpoint(weights, bases, out, scheme=scheme, search=ScaleSearch(n_coarse=2, n_fine=1))
    assert report.dtype == "float16"
    assert [tensor.name for tensor in report.tensors if tensor.dequantized is None] == ["large.weight"]
    assert [note for note in report.notes if note.startswith("large.weight: ") and "float16" in note]
    assert ExportReport.load(out).to_dict() == report.to_dict()
    assert "dequantized" not in report.to_dict()["totals"]


@pytest.mark.parametrize("alpha_scope", ["group", "layer"])
def test_the_report_of_a_mixture_of_experts_looks_at_every_element_for_every_reader(tmp_path, alpha_scope):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen3_moe, size=0.0005)
    search = ScaleSearch(n_coarse=2, n_fine=1, alpha_scope=alpha_scope)
    report = export_checkpoint(post, base, tmp_path / "out", search=search)
    for tensor in report.tensors:
        elements = math.prod(tensor.shape)
        assert {int(stats.n) for stats in (tensor.searched, tensor.absmax, tensor.dequantized)} == {elements}
    assert main(["inspect", str(tmp_path / "out"), "--base", str(base), "--post", str(post)]) == 0


def test_summary_table_and_inspect_name_both_readers(pair, tmp_path, capsys):
    base, post = pair
    out = tmp_path / "out"
    report = export_checkpoint(post, base, out, search=ScaleSearch(n_coarse=2, n_fine=1))
    line = next(line for line in report.summary().splitlines() if line.split()[0] == "dequantized")
    assert f"{report.metrics('dequantized')['lost']:.2%}" in line
    assert main(["inspect", str(out), "--base", str(base), "--post", str(post)]) == 0
    printed = capsys.readouterr().out
    assert "dequantized to bfloat16" in printed
    assert "14 of 14 weights agree" in printed
    content = json.loads((out / "daq_report.json").read_text())
    assert set(content["read_as"]) == {"searched", "dequantized"}
    first = next(iter(content["tensors"].values()))
    first["dequantized"]["sums"]["lost"] += 5
    (out / "daq_report.json").write_text(json.dumps(content))
    assert main(["inspect", str(out), "--base", str(base), "--post", str(post)]) == 3
    assert "dequantized lost" in capsys.readouterr().out


def test_a_report_from_before_is_still_read(pair, tmp_path):
    base, post = pair
    out = tmp_path / "out"
    export_checkpoint(post, base, out, search=ScaleSearch(n_coarse=2, n_fine=1))
    content = json.loads((out / "daq_report.json").read_text())
    for entry in content["tensors"].values():
        del entry["dequantized"]
    del content["totals"]["dequantized"], content["dtype"], content["read_as"]
    (out / "daq_report.json").write_text(json.dumps(content))
    report = ExportReport.load(out)
    assert "dequantized" not in report.summary()
    assert set(report.to_dict()["totals"]) == {"searched", "absmax"}
    assert main(["inspect", str(out), "--base", str(base), "--post", str(post)]) == 0
