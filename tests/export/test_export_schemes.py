"""Exports in every format: transformers loads exactly the weights that we read from them, their own checks
pass, and they serve as a base."""

import json
import math

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from daq_lightning import Chain, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit.evaluate import evaluate
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.audit.verify import run_checks
from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.objectives import measure

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

QUICK = ScaleSearch(n_coarse=3, n_fine=0)
PACKED = ("MXFP8", "W8A8", "W4A16", "W4A16_ASYM", "W4A16_G32", "W4A16_ASYM_G32", "NVFP4A16", "MXFP4A16")
EVERY = pytest.mark.parametrize("scheme", PACKED)


def one_layer(**changes):
    return tiny_models.llama(num_hidden_layers=1, **changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), one_layer)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """An exported folder and its report, made once."""
    made = {}

    def get(scheme):
        if scheme not in made:
            out = tmp_path_factory.mktemp("out") / scheme
            made[scheme] = out, export_checkpoint(pair[1], pair[0], out, scheme=scheme, search=QUICK)
        return made[scheme]

    return get


def load(folder, **arguments):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **arguments
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8, 24).reshape(2, 8)).logits


@EVERY
@tiny_models.DEQUANTIZES
def test_transformers_computes_with_the_weights_that_we_read(exported, tmp_path, scheme):
    folder, _ = exported(scheme)
    ours = dict(load_checkpoint(folder))
    if SCHEMES[scheme].quantized_activations or SCHEMES[scheme].asymmetric:  # as the plan says of these
        loaded = load(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    else:
        loaded = load(folder)
        logits(loaded)  # packed codes are unpacked by the first forward
    state = loaded.state_dict()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, state[name])] == []
    safetensors.torch.save_file(ours, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(loaded), logits(load(tmp_path)))


@EVERY
def test_an_export_passes_its_checks_and_its_figures_are_those_of_its_files(exported, pair, scheme):
    folder, report = exported(scheme)
    checks = run_checks(folder)
    assert [(check.name, check.problems) for check in checks if check.problems or check.skipped] == []
    post, base = load_checkpoint(pair[1]), load_checkpoint(pair[0])
    assert differences(report, recompute(report, post, base)) == {}
    # and by hand, from what compressed-tensors reads
    loaded = load(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    state = loaded.state_dict()
    for tensor in report.tensors:
        read = measure(post[tensor.name], base[tensor.name], state[tensor.name])
        for one, two in zip(tensor.dequantized, read, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)
    assert Chain.open(folder).verify() == []


@EVERY
def test_an_export_is_replaced_by_the_next(pair, tmp_path, scheme):
    out = tmp_path / "out"
    for _ in range(2):
        export_checkpoint(pair[1], pair[0], out, scheme=scheme, search=QUICK)
    stored = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert len([name for name in stored if name.endswith(".weight_scale")]) == 7


@EVERY
def test_a_quantized_base_is_read_and_a_chain_goes_on_from_it(exported, pair, tmp_path, scheme):
    """A model that was not trained on from a quantized base is what the base is: nothing is lost."""
    folder, _ = exported(scheme)
    base = load_checkpoint(folder)
    weights = dict(base)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name] + 1e-3 * torch.randn(
        weights[name].shape, generator=torch.Generator().manual_seed(0)
    ).to(weights[name].dtype)
    report = export_checkpoint(weights, base, tmp_path / "next", scheme=scheme, search=QUICK)
    changed = {tensor.name for tensor in report.tensors if bool(tensor.searched.n_changed)}
    assert changed == {name}
    chained = export_checkpoint(
        weights, folder, tmp_path / "chain", scheme=scheme, search=QUICK, chain_from="deployed"
    )
    assert chained.metrics("searched") == report.metrics("searched")
    assert Chain.open(tmp_path / "chain").verify() == []


def test_weights_that_servers_fuse_have_one_global_scale(tmp_path):
    shapes = {"q": (64, 128), "k": (32, 128), "v": (32, 128), "o": (128, 64)}
    generator = torch.Generator().manual_seed(0)
    post = {
        f"layers.0.self_attn.{leaf}_proj.weight": torch.randn(shape, generator=generator) * 1000.0**-index
        for index, (leaf, shape) in enumerate(shapes.items())
    }
    base = {name: weight * 0.99 for name, weight in post.items()}
    report = export_checkpoint(post, base, tmp_path / "out", scheme="NVFP4A16", search=QUICK)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    factors = {name[19]: float(stored[f"{name}_global_scale"]) for name in post}
    assert factors["q"] == factors["k"] == factors["v"] < factors["o"]
    assert all(math.frexp(factor)[0] == 0.5 for factor in factors.values())
    # plain scales are those that E4M3 holds under the same one, subnormal ones too
    assert differences(report, recompute(report, post, base)) == {}


@pytest.mark.parametrize("scheme", ["W4A16", "MXFP4A16"])
def test_experts_load_in_transformers(tmp_path, scheme):
    base, post = tiny_models.make_pair(tmp_path, lambda: tiny_models.qwen3_moe(num_hidden_layers=1))
    export_checkpoint(post, base, tmp_path / "out", scheme=scheme, search=QUICK)
    assert [check.name for check in run_checks(tmp_path / "out") if check.problems or check.skipped] == []
    state, ours = load(tmp_path / "out").state_dict(), load_checkpoint(tmp_path / "out")
    experts = [
        torch.cat([ours[f"model.layers.0.mlp.experts.{i}.{leaf}_proj.weight"] for leaf in ("gate", "up")])
        for i in range(2)
    ]
    assert torch.equal(state["model.layers.0.mlp.experts.gate_up_proj"], torch.stack(experts))


def test_a_row_of_one_group_is_a_group(tmp_path):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    export_checkpoint({"a.weight": weight}, {"a.weight": weight * 0.9}, tmp_path / "out", scheme="W4A16")
    assert load_checkpoint(tmp_path / "out").granularity("a.weight") == PerBlock(1, 128)


@pytest.mark.parametrize(("scheme", "costs"), [("W8A8", True), ("MXFP8", True), ("W4A16", False)])
def test_activations_are_those_of_the_scheme(exported, pair, scheme, costs):
    folder, _ = exported(scheme)
    models = {"export": load_checkpoint(folder), "post": load_checkpoint(pair[1])}
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(tiny_models.VOCABULARY, (24,), generator=generator).tolist() for _ in range(3)]
    served, weights = (evaluate(models, windows, weights_only=only) for only in (False, True))
    assert served.scheme == scheme
    assert served.quantized_activations is costs
    assert served.unseen == ()
    assert (served.figures["kld_mean"] != weights.figures["kld_mean"]) is costs
