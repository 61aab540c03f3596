"""Adapters merged into the format and the scales of their quantized base: nothing else changes, and the
update comes through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from tiny_models import llama, make_pair
from torch import Tensor

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.checkpoint.layouts import make_layout
from daq_lightning.checkpoint.tensor_file import TensorSpec
from daq_lightning.cli import main
from daq_lightning.cli.inputs import weights_of
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.numerics.rounding.statistics import Statistics

Q, DOWN, GATE = (f"model.layers.0.{leaf}_proj.weight" for leaf in ("self_attn.q", "mlp.down", "mlp.gate"))
ADAPTED = ("q_proj", "down_proj")
MIXED = ("W4A16", "W4A16_G32", "NVFP4A16", "FP8A16")
IGNORED = ["re:.*lm_head", "lm_head"]


def by_hand(
    folder: Path, base: Path, scheme: str, *, group: int | None = None, dtype=None, change=None
) -> Path:
    """A base as other makers quantize it, by NumPy: integers of four bits in groups, or FP8 by row."""
    layout = make_layout(scheme, group=group)
    tensors, codes_of = {}, {"W4A16": 7, "W4A16_ASYM": 15, "FP8_DYNAMIC": 448}
    for name, weight in load_checkpoint(base).items():
        if "_proj." not in name:
            tensors[name] = weight.contiguous()
            continue
        size = weight.shape[1] if scheme == "FP8_DYNAMIC" else (group or 128)
        groups = weight.float().numpy().reshape(weight.shape[0], -1, size)
        low, high = (np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0))
        width = high - low if layout.scheme.asymmetric else np.abs(groups).max(2)
        scale = torch.from_numpy(width / codes_of[scheme]).to(dtype or torch.bfloat16).float()
        zero = np.clip(np.rint(-8 - low / scale.numpy()), -8, 7) if layout.scheme.asymmetric else 0 * low
        values = torch.from_numpy(groups / scale.numpy()[..., None] + zero[..., None]).reshape(weight.shape)
        values = values if scheme == "FP8_DYNAMIC" else values.round().clamp(-8, 7)
        codes = values.to(layout.scheme.format.dtype)
        own = layout if dtype is None else type(layout)(
            scheme=layout.scheme, scale_format=layout.scale_format, scale_dtype=dtype
        )  # fmt: skip
        points = torch.from_numpy(zero).to(torch.int8) if layout.scheme.asymmetric else None
        names = own.names(name)
        tensors |= {names[part]: tensor for part, tensor in own.pack(codes, scale, zero=points).items()}
    shutil.copytree(base, folder)
    quantization = layout.quantization_config(IGNORED) | {"version": "0.15", "sparsity_config": {}}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    if change is not None:
        change(tensors, quantization)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Made(NamedTuple):
    base: Path
    adapter: Path
    merged: dict[str, Tensor]
    out: Path
    report: ExportReport


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("plain"), llama)[0]


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """A kind of base with an adapter, what PEFT itself merges, and the export that keeps its format; once."""
    kinds, found = tmp_path_factory.mktemp("bases"), {}

    def make(kind: str):
        if kind not in found:
            base = kinds / kind
            if kind == "groups of 32":
                by_hand(base, plain, "W4A16", group=32)
            elif kind == "W4A16_ASYM":
                by_hand(base, plain, "W4A16_ASYM")
            elif kind == "FP8_DYNAMIC":
                by_hand(base, plain, "FP8_DYNAMIC", dtype=torch.bfloat16)
            else:
                mixed = {"scheme": "W4A16", "budget": "7 bits", "ladder": MIXED} if kind == "mixed" else {}
                settings = {"scheme": kind, "search": ScaleSearch.absmax()} | mixed
                export_checkpoint(plain, plain, base, **settings)
            adapter, merged = with_adapter(base, kinds / f"adapter of {kind}")
            out = kinds / f"kept {kind}"
            report = export_checkpoint(base, base, out, adapter=adapter, scheme="keep")
            found[kind] = Made(base, adapter, merged, out, report)
        return found[kind]

    return make


def with_adapter(base: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """LoRA of rank 4 on some weights of a base, saved, and merged by PEFT in float32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(base))
    model.load_state_dict({name: tensor.float() for name, tensor in load_checkpoint(base).items()})
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ADAPTED))
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.001)
    adapted.save_pretrained(folder)
    return folder, adapted.merge_and_unload().state_dict()


def keep(made_of, out: Path, **settings) -> ExportReport:
    base, adapter, *_ = made_of
    return export_checkpoint(base, base, out, adapter=adapter, scheme="keep", **settings)


def stored(folder: Path) -> dict[str, bytes]:
    raw = load_checkpoint(folder).raw
    return {name: raw[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in raw}


def gain_of(made_of, out: Path) -> np.ndarray:
    """Of the adapted weights, from what compressed-tensors reads, in NumPy's float64."""
    base, merged = made_of.base, made_of.merged
    before, after = read_by_compressed_tensors(base), read_by_compressed_tensors(out)
    changed = [name for name in before if name.split(".")[-2] in ADAPTED]
    sums = np.zeros(2)
    for name in changed:
        delta = merged[name].numpy().astype("float64") - before[name]
        sums += [(delta * (after[name] - before[name])).sum(), (delta * delta).sum()]
    return sums[0] / sums[1]


def read_by_compressed_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Quantized weights, dequantized by others: in bfloat16, as transformers computes with them."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    state = safetensors.torch.load_file(folder / "model.safetensors")
    found = {}
    for name in load_checkpoint(folder):
        if "_proj." not in name:
            continue
        parts = {
            key.removeprefix(name.removesuffix("weight")): tensor
            for key, tensor in state.items()
            if key.startswith(name)
        }
        if config["quant_method"] == "fp8":
            blocks = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight = parts["weight"].float() * blocks
        else:
            read = QuantizationConfig.model_validate(config)
            module = name.removesuffix(".weight")
            [*_, group] = [
                group
                for group in read.config_groups.values()
                if len(read.config_groups) == 1 or any(match_name(module, one) for one in group.targets)
            ]
            compressor = BaseCompressor.get_value_from_registry(group.format or read.format)
            weight = compressor.decompress(parts, group)["weight"]
        found[name] = weight.bfloat16().double().numpy()
    return found


KINDS = ["W4A16", "mixed", "W4A16_ASYM", "groups of 32", "NVFP4A16", "FP8_BLOCK", "FP8_DYNAMIC",
         *(pytest.param(kind, marks=pytest.mark.slow)
           for kind in ("MXFP4A16", "MXFP8", "W8A8", "FP8A16"))]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_codes_of_adapted_weights_is_the_base_to_the_bit(made, kind):
    base, adapter, _, out, report = made(kind)
    before, after = stored(base), stored(out)
    specs, written = (
        {name: (entry.dtype, entry.shape) for name, entry in load_checkpoint(folder).raw.entries.items()}
        for folder in (base, out)
    )
    assert specs == written
    differing = {name for name in before if before[name] != after[name]}
    adapted = {name for name in load_checkpoint(base) if name.split(".")[-2] in ADAPTED}
    assert {name.removesuffix("_packed") for name in differing} == adapted
    configs = [json.loads((f / "config.json").read_text())["quantization_config"]
               for f in (base, out)]  # fmt: skip
    assert configs[0] == configs[1]
    assert (len(configs[0].get("config_groups", ())) > 1) == (kind == "mixed")
    assert verify_checkpoint(out) == []
    again = recompute(report, weights_of(str(base), str(adapter)), load_checkpoint(base))
    assert differences(report, again) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_comes_through_where_a_plain_merge_loses_it(made, tmp_path, kind):
    report = made(kind).report
    keep(made(kind), tmp_path / "plain", rounding="nearest")
    kept, nearest = gain_of(made(kind), made(kind).out), gain_of(made(kind), tmp_path / "plain")
    assert kept == pytest.approx(1, abs=0.05)
    assert nearest < 0.5 or kind == "W8A8"
    touched = [tensor for tensor in report.tensors if float(tensor.searched.delta_sq)]
    sums = np.array([[float(t.plain.dot), float(t.plain.delta_sq)] for t in touched]).sum(0)
    # others read 16 bit: of int8 that moves weights by a part of a step
    assert sums[0] / sums[1] == pytest.approx(nearest, abs=0.05 if kind == "W8A8" else 0.01)
    [note] = [note for note in report.notes if "plain merge" in note]
    assert f"{report.metrics()['gain']:.3f}" in note
    assert note in report.summary()


def test_the_weights_that_are_rounded_are_those_that_peft_merges(made):
    base, adapter, merged, *_ = made("W4A16")
    weights = Source.from_folder(base, adapter).weights
    for name in (Q, DOWN, GATE):
        torch.testing.assert_close(weights[name].float(), merged[name], rtol=1e-6, atol=1e-8)


def test_statistics_of_a_run_move_no_weight_that_did_not_change(made, tmp_path):
    base, adapter, *_ = made("W4A16")
    checkpoint, generator = load_checkpoint(base), torch.Generator().manual_seed(0)

    def squares(size: int) -> Tensor:
        x = torch.randn(64, size, generator=generator)
        return x.T @ x

    curvature = {
        name: Statistics(inputs=squares(spec.shape[1]), outputs=squares(spec.shape[0]), tokens=64, source="x")
        for name, spec in checkpoint.specs.items()
        if checkpoint.stored(name) is not None
    }
    job = prepare(
        Source.from_folder(base, adapter), checkpoint, ExportSettings(scheme="keep"), curvature=curvature
    )
    report = run(job, tmp_path / "out")
    methods = {tensor.name: tensor.rounding.method for tensor in report.tensors}
    assert (methods[Q], methods[DOWN], methods[GATE]) == ("curvature", "curvature", "nearest")
    [gate] = [tensor for tensor in report.tensors if tensor.name == GATE]
    assert "did not change" in gate.rounding.reason
    before, after = stored(base), stored(tmp_path / "out")
    assert before[f"{GATE}_packed"] == after[f"{GATE}_packed"]


def test_inputs_alone_are_joined_by_the_update_of_the_adapter(made, tmp_path):
    """Without it, codes along the inputs of a low-rank update would leave out a part of its strength."""
    base, adapter, *_ = made("W4A16")
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    inputs = {Q: Statistics(inputs=x.T @ x, outputs=None, tokens=16, source="inputs")}
    job = prepare(
        Source.from_folder(base, adapter),
        load_checkpoint(base),
        ExportSettings(scheme="keep"),
        curvature=inputs,
    )
    report = run(job, tmp_path / "out")
    [q] = [tensor for tensor in report.tensors if tensor.name == Q]
    assert q.rounding.method == "curvature"
    assert float(q.searched.dot / q.searched.delta_sq) == pytest.approx(1, abs=0.05)


def no_group(tensors, config):
    group = config["config_groups"].pop("group_0")
    names = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed") and Q not in name]
    for index, part in enumerate((names[:3], names[3:])):
        targets = [name.removesuffix(".weight") for name in part]
        config["config_groups"][f"group_{index}"] = group | {"targets": targets}


def static_activations(tensors, config):
    tensors[f"{Q.removesuffix('.weight')}.input_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [(no_group, f"no config group is for {Q}"), (static_activations, "scales of activations")],
)
def test_a_base_that_cannot_be_written_again_is_refused(plain, tmp_path, change, said):
    base = by_hand(tmp_path / "base", plain, "W4A16", change=change)
    with pytest.raises(CheckpointError, match=said):
        export_checkpoint(plain, base, tmp_path / "out", scheme="keep")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_groups_do_not_cut_its_rows_is_refused(plain, tmp_path):
    def ragged(tensors, config):
        tensors[f"{Q}_scale"] = tensors[f"{Q}_scale"].repeat(1, 3)

    base = by_hand(tmp_path / "base", plain, "W4A16", change=ragged)
    with pytest.raises(CheckpointError, match="even groups"):
        export_checkpoint(plain, base, tmp_path / "out", scheme="keep")


def test_a_base_that_is_not_quantized_or_no_folder_is_refused(plain, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"is not quantized: name a scheme"):
        export_checkpoint(plain, plain, tmp_path / "out", scheme="keep")
    with pytest.raises(CheckpointError, match="read from its folder"):
        export_checkpoint(plain, dict(load_checkpoint(plain)), tmp_path / "out", scheme="keep")
    called = [
        "quantize",
        str(plain),
        "--base",
        str(plain),
        "--out",
        str(tmp_path / "out"),
        "--scheme",
        "keep",
    ]
    assert main(called) == 1
    assert "not quantized" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(made, plain, tmp_path):
    base = made("W4A16").base
    smaller = make_pair(tmp_path, llama, intermediate_size=128)[0]
    other = export_checkpoint(smaller, smaller, tmp_path / "q", scheme="W4A16").path
    adapter, _ = with_adapter(Path(other), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="was it trained on this model"):
        export_checkpoint(base, base, tmp_path / "out", adapter=adapter, scheme="keep")


@pytest.mark.parametrize("choice", [
    {"ignore": ["lm_head"]}, {"container": "fp8"}, {"search": ScaleSearch(metric="cosine")},
])  # fmt: skip
def test_what_the_base_has_settled_is_no_choice(made, tmp_path, choice):
    with pytest.raises(ValueError, match=rf"keep.*leave .*{next(iter(choice))}"):
        keep(made("W4A16"), tmp_path / "out", **choice)


def test_the_recipe_makes_the_same_bytes_again(made, tmp_path, monkeypatch):
    keep(made("W4A16"), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    assert stored(tmp_path / "made-again") == stored(tmp_path / "out")


def test_groups_of_another_size_are_read_from_the_config():
    layout = make_layout("W4A16", group=32)
    weight = TensorSpec(name="a.weight", dtype=torch.bfloat16, shape=(8, 64))
    assert layout.stored(weight)["scale"].shape == (8, 2)
    with pytest.raises(ValueError, match="groups of 16"):
        make_layout("NVFP4A16", group=32)
