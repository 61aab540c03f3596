"""Exports whose codes are chosen along a curvature: as predicted, as reported, and the same however made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from live import folder_bytes
from sharded_runs import launch
from tiny_models import llama, make_pair, qwen3_moe

from daq_lightning import (
    CheckpointError,
    ExportReport,
    ScaleSearch,
    absmax_scale,
    export_checkpoint,
    load_checkpoint,
)
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.cli import main
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.rounding.curvature import factor
from daq_lightning.numerics.rounding.rounding import round_with_curvature
from daq_lightning.numerics.rounding.statistics import Statistics

Q, K, V = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv")
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder, llama)
    return folder


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory) -> ExportReport:
    out = tmp_path_factory.mktemp("exported") / "out"
    return export_checkpoint(pair / "post", pair / "base", out, rounding="curvature")


def by_name(report: ExportReport) -> dict:
    return {tensor.name: tensor for tensor in report.tensors}


def loss_of(error: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.trace(error.T @ outputs @ error @ inputs))


def damped(statistics: np.ndarray, damping: float) -> np.ndarray:
    return statistics / np.mean(np.diag(statistics)) + damping * np.eye(len(statistics))


def test_predicted_losses_are_those_of_the_files_and_shared_inputs_are_summed(pair, exported):
    base, post = load_checkpoint(pair / "base"), load_checkpoint(pair / "post")
    written = load_checkpoint(exported.path, dtype=torch.float32)

    def delta(name: str) -> np.ndarray:
        return (post[name].float() - base[name].float()).double().numpy()

    for name, sharing in ((Q, (Q, K, V)), (V, (Q, K, V)), (O_PROJ, (O_PROJ,))):
        rounding = by_name(exported)[name].rounding
        assert rounding.method == "curvature"
        assert rounding.source == "update"
        assert (rounding.damping_in, rounding.damping_out) == (0.1, 0.3)
        inputs = damped(sum(delta(other).T @ delta(other) for other in sharing), 0.1)
        outputs = damped(delta(name) @ delta(name).T, 0.3)
        error = written[name].double().numpy() - post[name].double().numpy()
        assert rounding.loss == pytest.approx(loss_of(error, outputs, inputs), rel=1e-4)
        assert rounding.loss < 0.9 * rounding.nearest_loss


def test_no_weight_is_predicted_worse_than_nearest(exported):
    for tensor in exported.tensors:
        assert tensor.rounding.loss <= tensor.rounding.nearest_loss, tensor.name


def test_scales_are_plain_unless_another_search_is_asked_for(pair, exported, tmp_path):
    assert all(tensor.alpha["moved"] == 0 for tensor in exported.tensors)
    search = ScaleSearch(metric="mse", n_coarse=4)
    searched = export_checkpoint(
        pair / "post", pair / "base", tmp_path / "out", rounding="curvature", search=search
    )
    assert any(tensor.alpha["moved"] > 0 for tensor in searched.tensors)
    assert searched.search["metric"] == "mse"


def test_the_report_is_that_of_the_written_codes(pair, exported):
    base, post = load_checkpoint(pair / "base"), load_checkpoint(pair / "post")
    loaded = ExportReport.load(exported.path)
    assert loaded.tensors[0].rounding == exported.tensors[0].rounding
    assert differences(loaded, recompute(loaded, post, base)) == {}
    nearest = by_name(exported)[Q]
    assert float(nearest.searched.error_sq) > float(nearest.absmax.error_sq)  # which is what it is not for


def test_auto_is_nearest_where_there_is_no_data(pair, tmp_path):
    auto = export_checkpoint(pair / "post", pair / "base", tmp_path / "auto")
    nearest = export_checkpoint(pair / "post", pair / "base", tmp_path / "nearest", rounding="nearest")
    assert all(tensor.rounding is None for tensor in auto.tensors)
    weights = [Path(report.path, "model.safetensors").read_bytes() for report in (auto, nearest)]
    assert weights[0] == weights[1]


def test_the_number_of_threads_changes_no_byte(pair, exported, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 3)
    try:
        export_checkpoint(pair / "post", pair / "base", tmp_path / "out", rounding="curvature")
    finally:
        torch.set_num_threads(before)
    one, many = folder_bytes(tmp_path / "out"), folder_bytes(Path(exported.path))
    assert [name for name in many if one[name] != many[name] and name != "daq_manifest.json"] == []


def test_weights_that_share_an_input_lie_in_one_file(pair):
    settings = ExportSettings(rounding="curvature", max_shard_bytes=20_000)
    job = prepare(Source.from_folder(pair / "post"), load_checkpoint(pair / "base"), settings)
    [group] = [part for part in job.plan.stored_together if any(spec.name == Q for spec in part)]
    assert {Q, K, V} < {spec.name for spec in group}
    assert sorted(spec.name for part in job.plan.stored_together for spec in part) == sorted(
        spec.name for spec in job.plan.stored
    )


def test_experts_are_rounded_one_by_one(tmp_path):
    base, post = make_pair(tmp_path, qwen3_moe)
    report = export_checkpoint(post, base, tmp_path / "out", rounding="curvature")
    experts = [tensor for tensor in report.tensors if ".experts." in tensor.name]
    assert len(experts) == 12
    assert all(tensor.rounding.method == "curvature" for tensor in experts)


def test_an_adapter_is_refused_with_the_reason(pair):
    job_of = Source.from_folder(pair / "post")
    low_rank = dataclasses.replace(job_of, low_rank=True)
    base = load_checkpoint(pair / "base")
    with pytest.raises(CheckpointError, match="few directions say nothing"):
        prepare(low_rank, base, ExportSettings(rounding="curvature"))
    assert prepare(low_rank, base, ExportSettings()).settings.rounding == "nearest"


def test_a_weight_without_update_or_base_is_searched_and_named(pair, tmp_path):
    base = {name: tensor.clone() for name, tensor in load_checkpoint(pair / "base").items()}
    post = dict(load_checkpoint(pair / "post").items())
    base[O_PROJ] = post[O_PROJ].clone()
    del base["model.layers.1.self_attn.o_proj.weight"]
    report = export_checkpoint(
        post, base, tmp_path / "out", rounding="curvature", missing_base="absmax", scheme="FP8_BLOCK"
    )
    assert by_name(report)[O_PROJ].rounding.reason == "it did not change"
    assert by_name(report)["model.layers.1.self_attn.o_proj.weight"].rounding.reason == "it has no base"
    assert f"nearest rounding of {O_PROJ}: it did not change." in report.notes


def statistics_of(weight: torch.Tensor, tokens: int = 400) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    m, n = weight.shape
    x = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator) ** 2
    y = torch.randn(tokens, m, generator=generator) * torch.rand(m, generator=generator) ** 2
    return Statistics(inputs=x.T @ x, outputs=y.T @ y, tokens=tokens, source="activations")


@pytest.mark.parametrize("low_rank", [False, True])
def test_collected_statistics_are_what_codes_are_chosen_along(pair, tmp_path, low_rank):
    post = load_checkpoint(pair / "post")
    known = {O_PROJ: statistics_of(post[O_PROJ])}
    source = dataclasses.replace(Source.from_folder(pair / "post"), low_rank=low_rank)
    job = prepare(source, load_checkpoint(pair / "base"), ExportSettings(), curvature=known)
    report = run(job, tmp_path / "out")
    tensor = by_name(report)[O_PROJ]
    assert tensor.rounding.source == ("activations" if low_rank else "activations and update")
    assert tensor.rounding.tokens == 400
    assert tensor.rounding.update == (0 if low_rank else 0.1)
    other = by_name(report)[Q].rounding
    assert other.reason.startswith("no token reached it") if low_rank else other.source == "update"
    if low_rank:
        weight = post[O_PROJ]
        expected = round_with_curvature(
            weight,
            absmax_scale(weight, PerBlock()),
            PerBlock(),
            inputs=factor(known[O_PROJ].inputs, damping=0.001),
            outputs=factor(known[O_PROJ].outputs, damping=0.01),
        )
        raw = load_checkpoint(report.path).raw
        assert torch.equal(raw[O_PROJ].view(torch.uint8), expected.codes.view(torch.uint8))


def test_statistics_that_are_no_curvature_leave_a_weight_at_nearest(pair, tmp_path):
    post = load_checkpoint(pair / "post")
    broken = dataclasses.replace(statistics_of(post[O_PROJ]), inputs=torch.full((128, 128), torch.nan))
    job = prepare(
        Source.from_folder(pair / "post"),
        load_checkpoint(pair / "base"),
        ExportSettings(),
        curvature={O_PROJ: broken},
    )
    rounding = by_name(run(job, tmp_path / "out"))[O_PROJ].rounding
    assert rounding.method == "nearest"
    assert "NaN or Inf" in rounding.reason


def test_the_command_rounds_and_its_recipe_makes_it_again(pair, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [str(pair / "post"), "--base", str(pair / "base"), "--out", str(out), "--quiet"]
    assert main(["quantize", *arguments, "--rounding", "curvature"]) == 0
    manifest = json.loads((out / "daq_manifest.json").read_text())
    assert manifest["settings"]["rounding"] == "curvature"
    card = (out / "README.md").read_text()
    assert "codes of these weights were chosen so that their errors cancel" in card
    assert "14 of 14 weights are rounded along their curvature (update)" in card
    monkeypatch.chdir(out)
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    again = folder_bytes(tmp_path / "made-again")
    assert again["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert main(["inspect", ".", "--base", str(pair / "base"), "--post", str(pair / "post")]) == 0


def test_an_export_that_is_cut_off_is_resumed_with_the_same_bytes(pair, tmp_path, monkeypatch):
    from daq_lightning.export import run as module

    def job():
        settings = ExportSettings(rounding="curvature", max_shard_bytes=100_000)
        return prepare(Source.from_folder(pair / "post"), load_checkpoint(pair / "base"), settings)

    run(job(), tmp_path / "expected")
    rounded, original = [], module.choose_codes

    def failing(*arguments):
        rounded.append(0)
        if len(rounded) > 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "choose_codes", failing)
    with pytest.raises(KeyboardInterrupt):
        run(job(), tmp_path / "out", resume=True)
    assert list(tmp_path.glob(".out.partial-*/.*.done"))
    rounded.clear()
    monkeypatch.setattr(module, "choose_codes", lambda *a: rounded.append(0) or original(*a))
    run(job(), tmp_path / "out", resume=True)
    assert 0 < len(rounded) < 10  # of ten groups
    one, two = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "expected")
    assert [name for name in two if one[name] != two[name] and name != "daq_manifest.json"] == []


@pytest.mark.parametrize(
    "entry", [{}, {"method": "up"}, {"loss": -1.0}, {"tokens": 1.5}, {"loss": "x"}, "curvature"]
)
def test_a_report_with_an_impossible_rounding_is_refused(exported, tmp_path, entry):
    content = json.loads(Path(exported.path, "daq_report.json").read_text())
    whole = content["tensors"][Q]["rounding"]
    content["tensors"][Q]["rounding"] = whole | entry if entry and isinstance(entry, dict) else entry
    (tmp_path / "daq_report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"how {Q} was rounded"):
        ExportReport.load(tmp_path)


# the rest runs in processes


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(pair, tmp_path):
    settings = ExportSettings(rounding="curvature", max_shard_bytes=100_000)
    job = prepare(Source.from_folder(pair / "post"), load_checkpoint(pair / "base"), settings)
    run(job, tmp_path / "one")
    for code, output in launch(__file__, [str(pair), str(tmp_path / "two")], 2):
        assert code == 0, output
    one, two = folder_bytes(tmp_path / "one"), folder_bytes(tmp_path / "two")
    assert len(one) > 4
    assert [name for name in one if one[name] != two[name] and name != "daq_manifest.json"] == []


def rank_main(pair: Path, out: Path) -> None:
    from daq_lightning.export.ranks import Ranks

    torch.distributed.init_process_group("gloo")
    ranks = Ranks.all()
    settings = ExportSettings(rounding="curvature", max_shard_bytes=100_000)
    source, base = Source.from_folder(pair / "post"), load_checkpoint(pair / "base")
    run(prepare(source, base, settings, ranks=ranks), out, ranks=ranks)
    ranks.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import sys

    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
