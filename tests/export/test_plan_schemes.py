"""Which sizes and which models a scheme takes, and what is said of its readers."""

import pytest
import tiny_models
import torch
from test_plan import ALL, layer, names, plan

from daq_lightning import export_checkpoint, load_checkpoint
from daq_lightning.checkpoint import readers
from daq_lightning.checkpoint.layouts import make_layout
from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec

CODES = {
    "MXFP8": ("e4m3", "MXFP8 (E4M3)"),
    "W8A8": ("int8", "8-bit integers"),
    "W4A16": ("int4", "4-bit integers"),
    "W4A16_ASYM": ("int4", "4-bit integers"),
    "W4A16_G32": ("int4", "4-bit integers"),
    "W4A16_ASYM_G32": ("int4", "4-bit integers"),
    "NVFP4A16": ("e2m1", "NVFP4 (E2M1)"),
    "MXFP4A16": ("e2m1", "MXFP4 (E2M1)"),
}
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("scheme", CODES)
def test_a_plan_names_the_format_and_counts_the_bytes_that_are_stored(scheme):
    planned = plan(arguments={"scheme": scheme})
    code, title = CODES[scheme]
    assert planned.layout == make_layout(scheme)
    assert names(planned) == layer(0, *ALL) | layer(1, *ALL)
    lines = planned.table().splitlines()
    for tensor, line in zip(planned.tensors, lines, strict=False):
        assert (f"-> {code} " in line) == tensor.quantize
    assert f"14 of {len(planned.tensors)} tensors in {title}, " in planned.table()
    for tensor in planned.quantized:
        bits = 8 * sum(spec.nbytes for spec in tensor.stored.values()) / tensor.spec.shape[0]
        assert bits / tensor.spec.shape[1] < {"e4m3": 8.3, "int8": 8.2, "int4": 4.7, "e2m1": 4.6}[code]


@pytest.mark.parametrize(
    ("scheme", "size", "fits"),
    [
        ("W8A8", 100, True),
        ("W4A16", 128 + 32, False),
        ("W4A16_G32", 128 + 32, True),
        ("W4A16_ASYM_G32", 128 + 16, False),
        ("MXFP4A16", 128 + 32, True),
        ("MXFP4A16", 128 + 16, False),
        ("NVFP4A16", 128 + 16, True),
        ("NVFP4A16", 128 + 8, False),
        ("MXFP8", 128 + 16, False),
    ],
)
def test_rows_that_no_whole_groups_fill_are_refused_by_name(scheme, size, fits):
    arguments = {"scheme": scheme}
    if fits:
        assert DOWN in names(plan(intermediate_size=size, arguments=arguments))
        return
    with pytest.raises(CheckpointError) as caught:
        plan(intermediate_size=size, arguments=arguments)
    message = str(caught.value)
    assert f"groups of {SCHEMES[scheme].group}; 2 weights" in message
    assert f"{DOWN} (128, {size})" in message
    assert "'W8A8'" in message
    arguments["ignore"] = ["re:.*down_proj"]
    assert names(plan(intermediate_size=size, arguments=arguments)) == layer(0, *ALL[:-1]) | layer(
        1, *ALL[:-1]
    )


def test_zero_points_of_a_part_of_eight_rows_are_refused():
    with pytest.raises(CheckpointError, match=r"zero points of 8 rows.*gate_proj.weight \(132, 128\)"):
        plan(
            intermediate_size=132,
            arguments={"scheme": "W4A16_ASYM", "ignore": ["re:.*down_proj"]},
        )


def test_weights_that_servers_fuse_are_searched_together_where_they_share_a_global_scale():
    planned = plan(arguments={"scheme": "NVFP4A16"})
    together = {}
    for tensor in planned.quantized:
        together.setdefault(tensor.together, set()).add(tensor.spec.name)
    fused = [layer(i, *leaves) for i in (0, 1) for leaves in (ALL[:3], ALL[4:6])]
    alone = [layer(i, leaf) for i in (0, 1) for leaf in ("self_attn.o", "mlp.down")]
    assert sorted(together.values(), key=sorted) == sorted(fused + alone, key=sorted)
    for parts in planned.stored_together:  # and lie in one file
        assert len({spec.name.rpartition(".")[0] for spec in parts}) in (1, 2, 3)
    assert {tensor.together for tensor in plan(arguments={"scheme": "MXFP4A16"}).quantized} == {""}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("W8A8", "cannot load W8A8"),
        ("MXFP8", "cannot load MXFP8"),
        ("W4A16_ASYM", "cannot load W4A16_ASYM"),
        ("W4A16_ASYM_G32", "cannot load W4A16_ASYM_G32"),
        ("W4A16_G32", "loads in transformers"),
        ("NVFP4A16", "without their global scale"),
        ("W4A16", "loads in transformers"),
        ("MXFP4A16", "loads in transformers"),
    ],
)
def test_what_readers_make_of_experts_is_noted(scheme, said):
    note, *more = plan(tiny_models.qwen3_moe, arguments={"scheme": scheme}).notes
    assert said in note
    assert more == [words for name, words in readers.ACTIVATIONS.items() if name == scheme]


def test_a_dense_model_has_a_note_only_where_a_reader_needs_more():
    notes = {scheme: plan(arguments={"scheme": scheme}).notes for scheme in CODES}
    for scheme in ("W4A16_ASYM", "W4A16_ASYM_G32"):
        [note] = notes.pop(scheme)
        assert f"{scheme} only dequantized" in note
        assert "CompressedTensorsConfig(dequantize=True)" in note
    [note] = notes.pop("MXFP4A16")
    assert "rounds activations of MXFP4A16 to four bits as well" in note
    assert set(notes.values()) == {()}


def test_a_format_that_the_installed_readers_do_not_know_is_noted(monkeypatch, tmp_path):
    assert readers.installed_readers_know("mxfp4-pack-quantized")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "base.py").write_text('float_quantized = "float-quantized"')
    origin = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(readers.util, "find_spec", lambda name: origin)
    note = plan(arguments={"scheme": "MXFP4A16"}).notes[-1]
    assert "does not know mxfp4-pack-quantized" in note
    assert plan(arguments={"scheme": "FP8_DYNAMIC"}).notes == ()
    monkeypatch.setattr(readers.util, "find_spec", lambda name: None)  # none is installed
    assert not any("does not know" in note for note in plan(arguments={"scheme": "MXFP4A16"}).notes)


def test_experts_of_uneven_shape_are_refused():
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    extra = [TensorSpec(name=name, dtype=torch.bfloat16, shape=(128, 256))]
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj.*\(128, 256\).*ignore all of them"):
        plan(tiny_models.qwen3_moe, drop=[name], extra=extra, arguments={"scheme": "W4A16"})


def of_shapes(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.0.{name.replace('__', '.')}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM_G32", "NVFP4A16", "MXFP8", "W8A8"])
def test_experts_of_uneven_shape_without_a_config_are_refused_too_and_nothing_is_written(tmp_path, scheme):
    uneven = of_shapes(mlp__experts__0__down_proj=(128, 128), mlp__experts__1__down_proj=(128, 256))
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj.*\(128, 256\).*ignore all of them"):
        export_checkpoint(uneven, uneven, tmp_path / "out", scheme=scheme)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "choices", [{"scheme": "W4A16"}, {"scheme": "NVFP4A16", "budget": "6 bits"}], ids=str
)
def test_weights_of_no_one_or_three_dimensions_stay_as_they_are_and_are_listed(tmp_path, choices):
    weights = of_shapes(o_proj=(128, 128), down_proj=(128, 256), gain=(), norm=(128,), conv=(8, 8, 128))
    report = export_checkpoint(weights, weights, tmp_path / "out", **choices)
    odd = {name for name, weight in weights.items() if weight.ndim != 2}
    assert {tensor.name for tensor in report.tensors}.isdisjoint(odd)
    assert odd <= set(report.kept)
    stored = load_checkpoint(tmp_path / "out").raw
    for name in odd:
        assert torch.equal(stored[name], weights[name])
    with pytest.raises(CheckpointError, match="no Linear weight to quantize"):
        export_checkpoint({name: weights[name] for name in odd}, weights, tmp_path / "none", **choices)
    assert not (tmp_path / "none").exists()
