"""Chains of exports: each stage knows its parent, and nothing in any stage can be altered unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from live import Tuning, fit, tiny_llama
from transformers import AutoModelForCausalLM

from daq_lightning import (
    Chain,
    CheckpointError,
    DeltaAwareQuantization,
    ExportReport,
    ScaleSearch,
    export_checkpoint,
    load_checkpoint,
)
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.numerics.objectives import measure
from daq_lightning.report.figures import figures

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def perturbed(folder: Path, out: Path, seed: int) -> Path:
    """A fine-tuned copy of a checkpoint folder, as transformers loads and saves it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    plain = tiny_llama().bfloat16()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 2e-3 * torch.randn(parameter.shape, generator=generator)
    plain.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    """root -> stage1 -> stage2 -> stage3: the second from deployed weights, the third from high-precision
    ones."""
    folder = tmp_path_factory.mktemp("chain")
    tiny_llama().bfloat16().save_pretrained(folder / "root")
    perturbed(folder / "root", folder / "post1", 1)
    export_checkpoint(folder / "post1", folder / "root", folder / "stage1", search=QUICK)
    perturbed(folder / "stage1", folder / "post2", 2)
    export_checkpoint(
        folder / "post2", folder / "stage1", folder / "stage2", search=QUICK, chain_from="deployed"
    )
    perturbed(folder / "post2", folder / "post3", 3)
    export_checkpoint(
        folder / "post3", folder / "post2", folder / "stage3", search=QUICK,
        parent=str(folder / "stage2"), chain_from="weights",
    )  # fmt: skip
    return folder


def test_a_chain_knows_its_stages_and_is_whole(lineage):
    chain = Chain.open(lineage / "stage3")
    assert [stage.manifest.lineage.stage for stage in chain.stages] == [1, 2, 3]
    assert [stage.manifest.lineage.chain_from for stage in chain.stages] == [None, "deployed", "weights"]
    assert chain.root == lineage / "root"
    assert chain.verify() == []
    table = chain.table()
    assert table.count("since its base") == 3
    assert table.count("since the root") == 2


def test_what_is_kept_since_the_root_is_that_of_the_files(lineage):
    report = ExportReport.load(lineage / "stage3")
    root, post, deployed = (load_checkpoint(lineage / name) for name in ("root", "post3", "stage3"))
    total = None
    for tensor in report.tensors:
        raw = deployed.raw
        scale = raw[tensor.name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        stats = measure(post[tensor.name], root[tensor.name], raw[tensor.name].float() * scale)
        total = stats if total is None else total.add(stats)
    assert figures(total) == pytest.approx(figures(report.totals("root")), rel=1e-5)


def _flip_a_code(stage: Path) -> str:
    file = stage / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    return "was altered"


def _change_the_report(stage: Path) -> str:
    report = json.loads((stage / "daq_report.json").read_text())
    report["totals"]["searched"]["cosine"] = 1.0
    (stage / "daq_report.json").write_text(json.dumps(report))
    return "daq_report.json was altered"


def _remove_a_file(stage: Path) -> str:
    (stage / "generation_config.json").unlink()
    return "generation_config.json is missing"


def _add_a_file(stage: Path) -> str:
    (stage / "extra.txt").write_text("hello")
    return "extra.txt does not belong"


def _cut_the_weights(stage: Path) -> str:
    file = stage / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "cut off or overwritten"


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
@pytest.mark.parametrize(
    "tamper", [_flip_a_code, _change_the_report, _remove_a_file, _add_a_file, _cut_the_weights]
)
def test_any_altered_missing_or_foreign_file_is_found(lineage, tmp_path, stage, tamper):
    shutil.copytree(lineage, tmp_path / "copy")
    message = tamper(tmp_path / "copy" / stage)
    problems = Chain.open(tmp_path / "copy" / "stage3").verify()
    assert len(problems) == 1
    assert message in problems[0]
    assert stage in problems[0]


def test_a_model_card_may_be_edited_added_and_removed(lineage, tmp_path):
    shutil.copytree(lineage, tmp_path / "copy")
    for card in sorted((tmp_path / "copy").glob("stage?/README.md"))[:2]:
        card.write_text("# Ours\n")
    (tmp_path / "copy" / "stage3" / "README.md").unlink()
    assert Chain.open(tmp_path / "copy" / "stage3").verify() == []


def test_an_altered_manifest_is_refused(lineage, tmp_path):
    shutil.copytree(lineage, tmp_path / "copy")
    path = tmp_path / "copy" / "stage2" / "daq_manifest.json"
    path.write_text(path.read_text().replace('"stage": 2', '"stage": 7'))
    with pytest.raises(CheckpointError, match="was altered"):
        Chain.open(tmp_path / "copy" / "stage3")


def test_a_parent_that_was_exported_again_is_not_the_parent(lineage, tmp_path):
    shutil.copytree(lineage, tmp_path / "copy")
    copy = tmp_path / "copy"
    export_checkpoint(copy / "post1", copy / "root", copy / "stage1", search=ScaleSearch.absmax())
    with pytest.raises(CheckpointError, match="is not the parent"):
        Chain.open(copy / "stage3")


@pytest.mark.parametrize(
    ("post", "base", "options", "message"),
    [
        ("post2", "stage1", {"parent": "stage1"}, "say what this stage was trained from"),
        ("post2", "post1", {"chain_from": "deployed"}, "needs parent="),
        ("post2", "post1", {"parent": "stage1", "chain_from": "deployed"}, "7 of 7 base weights differ"),
        ("post2", "stage1", {"parent": "stage1", "chain_from": "weights"}, "7 of 7 base weights differ"),
        ("post2", "stage1", {"parent": "root", "chain_from": "weights"}, "root is none"),
    ],
)
def test_where_a_stage_began_is_checked_and_never_guessed(lineage, tmp_path, post, base, options, message):
    if "parent" in options:
        options = options | {"parent": str(lineage / options["parent"])}
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(lineage / post, lineage / base, tmp_path / "out", search=QUICK, **options)
    assert not (tmp_path / "out").exists()


def test_a_run_can_go_on_from_what_transformers_loads_of_an_export(lineage, tmp_path):
    # transformers remembers that it dequantized the weights, and would save them quantized again
    model = AutoModelForCausalLM.from_pretrained(lineage / "stage1").float()
    parent = str(lineage / "stage1")
    callback = DeltaAwareQuantization(
        str(tmp_path / "out"), search=QUICK, parent=parent, chain_from="deployed"
    )
    fit(tmp_path, callback, module=Tuning(model))
    chain = Chain.open(callback.exports[0])
    assert [stage.manifest.lineage.chain_from for stage in chain.stages] == [None, "deployed"]
    assert {*chain.stages[1].manifest.tensors} == {*chain.stages[0].manifest.tensors}
    assert {*chain.stages[1].manifest.kept} == {*chain.stages[0].manifest.kept}


def test_an_export_as_base_without_a_chain_begins_a_new_one(lineage, tmp_path):
    export_checkpoint(lineage / "post2", lineage / "stage1", tmp_path / "out", search=QUICK)
    assert Manifest.load(tmp_path / "out").lineage.stage == 1


def test_the_manifest_holds_no_absolute_path(lineage):
    assert str(lineage) not in (lineage / "stage3" / "daq_manifest.json").read_text()


def test_the_base_of_the_chain_is_never_overwritten(lineage):
    with pytest.raises(CheckpointError, match="which this export would replace"):
        export_checkpoint(lineage / "post2", lineage / "stage1", lineage / "stage1", search=QUICK)
