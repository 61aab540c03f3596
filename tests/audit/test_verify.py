"""Every rule of the contract notices when it is broken; figures recomputed from the files agree with
float64."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from daq_lightning import CheckpointError, ExportReport, export_checkpoint, load_checkpoint
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.audit.verify import checklist, run_checks, verify_checkpoint
from daq_lightning.checkpoint.layouts import make_layout, read_layout
from daq_lightning.report.text import table, worst_first

SIZES = dict(
    hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
)
LLAMA = transformers.LlamaConfig(intermediate_size=256, **SIZES)
TIED = transformers.LlamaConfig(intermediate_size=256, tie_word_embeddings=True, **SIZES)
MOE = transformers.Qwen3MoeConfig(
    intermediate_size=256,
    moe_intermediate_size=128,
    head_dim=32,
    num_experts=2,
    num_experts_per_tok=1,
    **SIZES,
)
Q = "model.layers.0.self_attn.q_proj"
SCALE = f"{Q}.weight_scale_inv"


def save_pair(config, folder):
    """A model and a fine-tuned copy of it, as folders."""
    tiny_models.make_pair(folder, lambda: transformers.AutoModelForCausalLM.from_config(config), size=0.0015)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def clean(pair):
    """An export of several shards."""
    export_checkpoint(pair / "post", pair / "base", pair / "fp8", scheme="FP8_BLOCK", max_shard_bytes=100_000)
    return pair / "fp8"


@pytest.fixture
def folder(clean, tmp_path):
    """A copy of the clean export, to be damaged."""
    return shutil.copytree(clean, tmp_path / "fp8")


def failed(folder):
    """The names of the checks that fail."""
    return {check.name for check in run_checks(folder) if check.problems}


def edit_json(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def edit_tensors(folder, change, metadata=("format", "pt")):
    """Writes all tensors into one file, after a change of the dict of them, with a fitting index."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", dict([metadata]))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def moved(name, new):
    return lambda tensors: tensors.update({new: tensors.pop(name)})


def replaced(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def with_value(name, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return replaced(name, change)


def with_code(byte):
    def change(codes):
        codes = codes.clone()
        codes.view(torch.uint8)[1, 2] = byte
        return codes

    return replaced(f"{Q}.weight", change)


def as_bfloat16(tensors, name=f"{Q}.weight"):
    """Stores a weight in high precision and drops its scale."""
    tensors[name] = tensors[name].to(torch.bfloat16)
    del tensors[name + "_scale_inv"]


TENSOR_DAMAGES = {
    "no scale": (lambda tensors: tensors.pop(SCALE), {"one scale per weight"}),
    "scale of another layout": (moved(SCALE, f"{Q}.weight_scale"), {"one scale per weight"}),
    "two scales": (
        lambda tensors: tensors.update({f"{Q}.weight_scale": tensors[SCALE].clone()}),
        {"one scale per weight"},
    ),
    "orphan scale": (
        lambda tensors: tensors.update({"x.weight_scale_inv": torch.ones(1, 1)}),
        {"one scale per weight"},
    ),
    "bfloat16 scale": (replaced(SCALE, torch.Tensor.bfloat16), {"one scale per weight"}),
    "one-dimensional scale": (replaced(SCALE, torch.Tensor.flatten), {"one scale per weight"}),
    "scale NaN": (with_value(SCALE, float("nan")), {"scale values"}),
    "scale Inf": (with_value(SCALE, float("inf")), {"scale values"}),
    "scale zero": (with_value(SCALE, 0.0), {"scale values"}),
    "scale negative": (with_value(SCALE, -1e-3), {"scale values"}),
    "code NaN": (with_code(0x7F), {"finite values"}),
    "code negative NaN": (with_code(0xFF), {"finite values"}),
    "kept NaN": (with_value("model.norm.weight", float("nan")), {"finite values"}),
    "kept -Inf": (with_value("lm_head.weight", float("-inf")), {"finite values"}),
    "half of a fused projection": (as_bfloat16, {"fused projections", "ignore list", "report"}),
    "most of a fused projection": (
        lambda tensors: [
            as_bfloat16(tensors, Q.replace("q_proj", leaf) + ".weight") for leaf in ("q_proj", "k_proj")
        ],
        {"fused projections", "ignore list", "report"},
    ),
    "missing tensor": (lambda tensors: tensors.pop("model.norm.weight"), {"complete"}),
    "unknown tensor": (lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}), {"complete"}),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_damaged_tensors_are_found_by_the_right_check(folder, damage):
    change, expected = TENSOR_DAMAGES[damage]
    edit_tensors(folder, change)
    assert failed(folder) == expected


def edit_config(change):
    return lambda folder: edit_json(folder, "config.json", change)


def edit_list(change):
    return edit_config(lambda config: change(config["quantization_config"]["modules_to_not_convert"]))


FOLDER_DAMAGES = {
    "lm_head not listed": (edit_list(lambda names: names.remove("lm_head")), {"ignore list", "report"}),
    "quantized module listed": (edit_list(lambda names: names.append(Q)), {"ignore list", "report"}),
    "float32": (edit_config(lambda config: config.update(dtype="float32")), {"config.json"}),
    "no dtype": (edit_config(lambda config: config.pop("dtype")), {"config.json"}),
    "other quantization": (
        edit_config(lambda config: config["quantization_config"].update(quant_method="awq")),
        None,
    ),
    "float32 inside": (
        edit_config(lambda config: config.update(sub_config={"dtype": "float32"})),
        {"config.json"},
    ),
    "other blocks": (
        edit_config(lambda config: config["quantization_config"].update(weight_block_size=[64, 64])),
        {"config.json", "report"},
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), {"config.json"}),
    "total_size": (
        lambda folder: edit_json(
            folder, "model.safetensors.index.json", lambda index: index["metadata"].clear()
        ),
        {"files"},
    ),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), {"files"}),
    "pickle": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), {"nothing stale"}),
    "old shard": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
        {"nothing stale"},
    ),
    "lock": (lambda folder: (folder / ".lock").touch(), {"nothing stale"}),
    "header": (lambda folder: edit_tensors(folder, lambda tensors: None, ("format", "np")), {"files"}),
    "report of another export": (
        lambda folder: edit_json(
            folder, "daq_report.json", lambda report: report["tensors"].pop(f"{Q}.weight")
        ),
        {"report"},
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_damaged_folders_are_found_by_the_right_check(folder, damage):
    change, expected = FOLDER_DAMAGES[damage]
    change(folder)
    assert failed(folder) == ({"config.json", "report"} if expected is None else expected)


def test_a_file_that_was_cut_off_fails_the_first_check(folder):
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    checks = run_checks(folder)
    assert [check.name for check in checks] == ["files"]
    assert "cut off" in checks[0].problems[0]


def test_what_is_not_an_fp8_checkpoint_is_refused(pair, tmp_path):
    for path in (tmp_path / "nothing", tmp_path, pair / "post"):
        with pytest.raises(CheckpointError):
            run_checks(path)


def test_clean_exports_of_every_layout_pass(pair, clean, tmp_path):
    assert verify_checkpoint(clean) == []
    layouts = [
        dict(scheme="FP8_DYNAMIC", scale_format="ue8m0"),
        dict(scheme="FP8A16"),
        dict(scheme="FP8_BLOCK", container="compressed-tensors", ignore=["re:.*self_attn.*"]),
        dict(scheme="FP8_BLOCK", scale_format="ue8m0"),
    ]
    for layout in layouts:
        export_checkpoint(pair / "post", pair / "base", tmp_path / "out", **layout)
        assert verify_checkpoint(tmp_path / "out") == []
        assert all(not check.skipped for check in run_checks(tmp_path / "out"))


@pytest.mark.parametrize(
    ("layout", "scale"),
    [
        (dict(scheme="FP8_BLOCK", scale_format="ue8m0"), SCALE),
        (dict(scheme="FP8_DYNAMIC"), f"{Q}.weight_scale"),
    ],
)
def test_a_scale_that_the_reader_would_round_is_found(pair, tmp_path, layout, scale):
    export_checkpoint(pair / "post", pair / "base", tmp_path / "out", **layout)
    edit_tensors(tmp_path / "out", with_value(scale, 2.0**-10 * (1 + 2**-12)))
    assert failed(tmp_path / "out") == {"scale values"}


def test_weights_whose_rows_do_not_fill_blocks_are_found(folder):
    def grow(tensors):
        tensors[f"{Q}.weight"] = torch.cat([tensors[f"{Q}.weight"], tensors[f"{Q}.weight"][:64]])
        tensors[SCALE] = tensors[SCALE].repeat(2, 1)

    edit_tensors(folder, grow)
    assert failed(folder) == {"sizes fit the blocks"}


def test_mixtures_of_experts(tmp_path):
    save_pair(MOE, tmp_path)
    out = tmp_path / "fp8"
    export_checkpoint(tmp_path / "post", tmp_path / "base", out, scheme="FP8_BLOCK")
    assert verify_checkpoint(out) == []

    without_router = shutil.copytree(out, tmp_path / "router")
    edit_list(lambda names: names.remove("model.layers.0.mlp.gate"))(without_router)
    assert failed(without_router) == {"ignore list", "report"}

    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    without_expert = shutil.copytree(out, tmp_path / "expert")
    edit_tensors(without_expert, lambda tensors: (tensors.pop(expert), tensors.pop(expert + "_scale_inv")))
    assert failed(without_expert) == {"complete", "report"}

    kept_expert = shutil.copytree(out, tmp_path / "kept")
    edit_tensors(kept_expert, lambda tensors: as_bfloat16(tensors, expert))
    assert failed(kept_expert) == {"ignore list", "report"}

    def quantize_router(tensors):
        name = "model.layers.0.mlp.gate.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)

    quantized_router = shutil.copytree(out, tmp_path / "quantized")
    edit_tensors(quantized_router, quantize_router)
    assert "quantized modules" in failed(quantized_router)


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(tmp_path):
    save_pair(TIED, tmp_path)
    out = tmp_path / "fp8"
    export_checkpoint(tmp_path / "post", tmp_path / "base", out)
    assert verify_checkpoint(out) == []
    edit_tensors(out, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert verify_checkpoint(out) == []
    edit_tensors(out, with_value("lm_head.weight", 3.0))
    assert failed(out) == {"tied embeddings"}


def test_the_checklist_says_what_to_do(folder):
    (folder / "old.bin").touch()
    lines = checklist(run_checks(folder)).splitlines()
    failing = lines.index("FAILED  nothing stale")
    assert "old.bin" in lines[failing + 1]
    assert "Remove" in lines[failing + 2]
    assert lines[-1].startswith("1 of ")


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
@pytest.mark.parametrize(
    ("scheme", "container"),
    [("FP8_BLOCK", "fp8"), ("FP8_BLOCK", "compressed-tensors"), ("FP8_DYNAMIC", None), ("FP8A16", None)],
)
def test_the_layout_is_read_back_from_its_config(scheme, container, scale_format):
    layout = make_layout(scheme, container=container, scale_format=scale_format)
    read = read_layout(json.loads(json.dumps(layout.quantization_config(["lm_head"]))))
    if container == "fp8" or scale_format is None:
        assert read == layout
    else:  # compressed-tensors has no word for powers of two
        assert (read.scheme.name, read.container, read.scale_format) == (
            scheme,
            "compressed-tensors",
            "bfloat16",
        )


def raw(folder, name):
    """A tensor of a folder in float64, by the safetensors library and ml_dtypes."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            if name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
                return tensor.double().numpy()
    raise KeyError(name)


def test_recomputed_figures_are_those_of_numpy_and_of_the_report(pair, clean):
    report = ExportReport.load(clean)
    found = recompute(report, load_checkpoint(pair / "post"), load_checkpoint(pair / "base"))
    assert differences(report, found) == {}
    for tensor in found.tensors:
        weight, base = raw(pair / "post", tensor.name), raw(pair / "base", tensor.name)
        scale = np.kron(raw(clean, f"{tensor.name}_scale_inv"), np.ones((128, 128)))
        written = (raw(clean, tensor.name) * scale).astype(np.float32).astype(np.float64)
        delta, kept = weight - base, written - base
        assert int(tensor.searched.sign_equal) == (np.sign(delta) == np.sign(kept)).sum()
        assert int(tensor.searched.lost) == ((delta != 0) & (kept == 0)).sum()
        assert float(tensor.searched.dot) == pytest.approx((delta * kept).sum(), rel=1e-5)
        assert float(tensor.searched.error_sq) == pytest.approx(((written - weight) ** 2).sum(), rel=1e-5)


def test_bands_add_up_to_the_whole(pair, clean, monkeypatch):
    report = ExportReport.load(clean)
    models = load_checkpoint(pair / "post"), load_checkpoint(pair / "base")
    monkeypatch.setattr("daq_lightning.audit.recompute._BAND", 1)
    assert differences(report, recompute(report, *models)) == {}


@pytest.mark.parametrize("layout", [dict(scheme="FP8_DYNAMIC"), dict(scheme="FP8A16", scale_format="ue8m0")])
def test_reports_of_other_layouts_agree_with_their_files(pair, tmp_path, layout):
    report = export_checkpoint(pair / "post", pair / "base", tmp_path / "out", **layout)
    found = recompute(report, load_checkpoint(pair / "post"), load_checkpoint(pair / "base"))
    assert differences(report, found) == {}


def test_a_single_changed_code_and_another_base_are_noticed(pair, folder):
    report = ExportReport.load(folder)
    post, base = load_checkpoint(pair / "post"), load_checkpoint(pair / "base")
    assert set(differences(report, recompute(report, base, post))) == {
        tensor.name for tensor in report.tensors
    }
    edit_tensors(folder, with_code(0x01))
    assert list(differences(report, recompute(report, post, base))) == [f"{Q}.weight"]


def test_the_models_must_fit_the_export(pair, clean):
    report = ExportReport.load(clean)
    post = {name: tensor for name, tensor in load_checkpoint(pair / "post").items() if name != f"{Q}.weight"}
    with pytest.raises(CheckpointError, match=r"fine-tuned model has no tensor .*q_proj"):
        recompute(report, post, load_checkpoint(pair / "base"))
    post[f"{Q}.weight"] = torch.zeros(2, 128)
    with pytest.raises(CheckpointError, match="in shape"):
        recompute(report, post, load_checkpoint(pair / "base"))


def test_the_table_lists_the_worst_first_and_weights_without_an_update_last(pair, tmp_path):
    post, base = dict(load_checkpoint(pair / "post")), dict(load_checkpoint(pair / "base"))
    post[f"{Q}.weight"] = base[f"{Q}.weight"]
    report = export_checkpoint(post, base, tmp_path / "out")
    tensors = worst_first(report)
    entries = report.to_dict()["tensors"]
    cosines = [entries[tensor.name]["searched"]["cosine"] for tensor in tensors]
    assert tensors[-1].name == f"{Q}.weight"
    assert cosines[:-1] == sorted(cosines[:-1])
    assert sum(tensor.name in table(report, 2) for tensor in tensors) == 2
    assert "no update" in table(report)


def plain_export(folder, base):
    """An export of tensors in memory, which have no config.json."""
    generator = torch.Generator().manual_seed(0)
    post = {
        name: tensor + 0.003 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()
    }
    export_checkpoint(post, base, folder)
    return folder


@pytest.mark.parametrize("size", [128, 96])
def test_the_export_of_a_plain_module_is_well(tmp_path, size):
    module = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 8))
    out = plain_export(
        tmp_path / "fp8", {name: tensor.detach() for name, tensor in module.state_dict().items()}
    )
    assert verify_checkpoint(out) == []
    assert "all is well" in checklist(run_checks(out))
    [config] = [check for check in run_checks(out) if check.name == "config.json"]
    assert "the exported module has none" in config.skipped
    scale = next(
        name for name in load_file(out / "model.safetensors") if name.endswith(("_scale", "_scale_inv"))
    )
    edit_tensors(out, lambda tensors: tensors.update({scale: -tensors[scale]}))
    assert failed(out) == {"scale values"}


def test_an_export_that_lost_its_config_is_not_taken_for_a_plain_module(folder):
    (folder / "config.json").unlink()
    assert "config.json" in failed(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", '{"format_version": 1}', '{"format_version": 1, "tensors": {}}', None]
)
def test_a_report_that_is_none_fails_the_check(folder, content):
    report = folder / "daq_report.json"
    report.unlink() if content is None else report.write_text(content)
    assert failed(folder) == {"report"}


def test_a_manifest_that_was_altered_fails_the_check(folder):
    edit_json(folder, "daq_manifest.json", lambda manifest: manifest.update(scheme="x"))
    assert failed(folder) == {"report"}


def test_an_fp8_folder_of_another_maker_has_no_report_to_check(folder):
    for name in ("daq_report.json", "daq_manifest.json"):
        (folder / name).unlink()
    assert failed(folder) == set()
