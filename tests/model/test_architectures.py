"""transformers loads every export completely, and computes with exactly the weights that codes and scales
stand for."""

import json
import shutil

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.model.architecture import Architecture

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)
VARIANTS = {
    "block": {"scheme": "FP8_BLOCK"},
    "block-ue8m0": {"scheme": "FP8_BLOCK", "scale_format": "ue8m0"},
    "block-compressed": {"scheme": "FP8_BLOCK", "container": "compressed-tensors"},
    "channel": {"scheme": "FP8_DYNAMIC"},
    "channel-a16": {"scheme": "FP8A16"},
}
LINEAR = tuple(
    f"{part}_proj"
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)
ATTENTION = LINEAR[:4]
CLIP_LAYER = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
LLAVA_KEPT = [f"vision_tower.encoder.layers.0.{leaf}" for leaf in CLIP_LAYER] + [
    f"multi_modal_projector.linear_{i}" for i in (1, 2)
]
QWEN2_VL_KEPT = [
    f"visual.{leaf}"
    for leaf in ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
    "merger.mlp.0",
                 "merger.mlp.2")
]  # fmt: skip


def layers(prefix, *leaves):
    return [f"{prefix}.{layer}.{leaf}" for layer in range(2) for leaf in leaves]


MODELS = {  # factory, quantized modules on disk, ignored modules on disk, ignored modules in memory
    name: (getattr(tiny_models, name), layers("model.layers", *LINEAR), ["lm_head"], ["lm_head"])
    for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3")
}
MODELS["phi3"] = (
    tiny_models.phi3,
    layers("model.layers", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ["lm_head"],
    ["lm_head"],
)
MODELS["qwen3_moe"] = (
    tiny_models.qwen3_moe,
    layers("model.layers", *ATTENTION)
    + layers(
        "model.layers", *(f"mlp.experts.{i}.{leaf}_proj" for i in range(2) for leaf in ("gate", "up", "down"))
    ),
    ["lm_head", *layers("model.layers", "mlp.gate")],
    ["lm_head", *layers("model.layers", "mlp.gate")],
)
MODELS["mixtral"] = (
    tiny_models.mixtral,
    layers("model.layers", *ATTENTION)
    + layers(
        "model.layers", *(f"block_sparse_moe.experts.{i}.{w}" for i in range(2) for w in ("w1", "w2", "w3"))
    ),
    ["lm_head", *layers("model.layers", "block_sparse_moe.gate")],
    ["lm_head", *layers("model.layers", "mlp.gate")],
)
MODELS["llava"] = (
    tiny_models.llava,
    layers("language_model.model.layers", *LINEAR),
    [*LLAVA_KEPT, "language_model.lm_head"],
    [*(f"model.{name}" for name in LLAVA_KEPT), "lm_head"],
)
MODELS["qwen2_vl"] = (
    tiny_models.qwen2_vl,
    layers("model.layers", *LINEAR),
    [*QWEN2_VL_KEPT, "lm_head"],
    [*(f"model.{name}" for name in QWEN2_VL_KEPT), "lm_head"],
)
MIXTURES = ("qwen3_moe", "mixtral")
CASES = [(name, variant) for name in MODELS for variant in VARIANTS
         if not (name in MIXTURES and variant == "block-compressed")]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base and post folder of an architecture, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_models.make_pair(tmp_path_factory.mktemp(name), MODELS[name][0])
        return made[name]

    return get


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """An exported folder, made once."""
    made = {}

    def get(name, variant):
        if (name, variant) not in made:
            base, post = pair(name)
            out = tmp_path_factory.mktemp("exports") / f"{name}-{variant}"
            export_checkpoint(post, base, out, search=QUICK, **VARIANTS[variant])
            made[name, variant] = out
        return made[name, variant]

    return get


def stored_tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def ignored(folder):
    quantization = config_of(folder)["quantization_config"]
    return quantization["modules_to_not_convert" if quantization["quant_method"] == "fp8" else "ignore"]


def meant_tensors(folder, dtype=torch.bfloat16):
    """What codes and scales stand for: dtype(float32(code) * float32(scale)), written out with torch
    alone."""
    stored = stored_tensors(folder)
    meant = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        scale = next((stored[name + end] for end in ("_scale", "_scale_inv") if name + end in stored), None)
        if scale is not None:
            rows, cols = tensor.shape[0] // scale.shape[0], tensor.shape[1] // scale.shape[1]
            factor = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            tensor = (tensor.float() * factor).to(dtype)
        meant[name] = tensor
    return meant


def write_meant(folder, target):
    """A plain folder in high precision with the weights that an export stands for."""
    target.mkdir()
    safetensors.torch.save_file(meant_tensors(folder), target / "model.safetensors", {"format": "pt"})
    config = config_of(folder)
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def load(folder, **arguments):
    config = config_of(folder)
    model_class = getattr(transformers, config["architectures"][0])
    if config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        arguments["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    return model.eval(), {key: value for key, value in info.items() if value}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8, 24).reshape(2, 8)).logits


@pytest.mark.parametrize(("name", "variant"), CASES)
@tiny_models.DEQUANTIZES
def test_transformers_loads_the_export_bit_exactly_and_completely(exported, tmp_path, name, variant):
    folder = exported(name, variant)
    loaded, problems = load(folder)
    assert problems == {}
    reference, _ = load(write_meant(folder, tmp_path / "meant"))
    expected = reference.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    different = [key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[key])]
    assert different == []
    assert torch.equal(logits(loaded), logits(reference))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_exactly_the_linear_layers_are_codes_with_one_scale_each(exported, name, variant):
    folder = exported(name, variant)
    stored = stored_tensors(folder)
    _, quantized, on_disk, in_memory = MODELS[name]
    codes = {key for key, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert codes == {f"{module}.weight" for module in quantized}
    suffix = "_scale_inv" if variant in ("block", "block-ue8m0") else "_scale"
    assert {key for key in stored if "_scale" in key} == {key + suffix for key in codes}
    for key in codes:
        scale, (rows, cols) = stored[key + suffix], stored[key].shape
        assert scale.dtype == torch.float32
        assert tuple(scale.shape) == (
            (rows // 128, cols // 128) if variant.startswith("block") else (rows, 1)
        )
        assert bool(((scale > 0) & scale.isfinite()).all())
        if suffix == "_scale":  # transformers casts these to bfloat16: that must change nothing
            assert torch.equal(scale, scale.bfloat16().float())
        if variant == "block-ue8m0":
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert set(ignored(folder)) == {*on_disk, *in_memory}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_matching_of_the_ignore_list_finds_the_quantized_modules(exported, pair, name):
    folder = exported(name, "block")
    post, _ = load(pair(name)[1])
    quantizer = AutoHfQuantizer.from_config(config_of(folder)["quantization_config"], pre_quantized=True)
    quantizer._normalize_modules_to_not_convert(post)
    kept = quantizer.quantization_config.modules_to_not_convert
    converted = {
        key
        for key, module in post.named_modules()
        if (isinstance(module, nn.Linear) or key.endswith(".experts")) and should_convert_module(key, kept)
    }
    loaded, _ = load(folder)
    before, after = post.state_dict(), loaded.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    owners = {key.rpartition(".")[0] for key in changed}
    assert converted == owners


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MIXTURES])
@tiny_models.DEQUANTIZES
def test_compressed_tensors_own_matching_finds_the_quantized_modules(exported, pair, name):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    folder = exported(name, "channel")
    post, _ = load(pair(name)[1])
    before = post.state_dict()
    loaded, _ = load(folder)
    changed = {
        key.rpartition(".")[0]
        for key, tensor in loaded.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    apply_quantization_config(
        post, QuantizationConfig.model_validate(config_of(folder)["quantization_config"])
    )
    matched = {
        key
        for key, module in post.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    assert matched == changed


@pytest.mark.parametrize("variant", ["channel", "channel-a16"])
def test_a_compressed_folder_loads_without_a_word_about_how(exported, variant):
    folder = exported("llama", variant)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    module = model.model.layers[0].mlp.down_proj
    stored = stored_tensors(folder)
    assert torch.equal(module.weight_scale.float(), stored["model.layers.0.mlp.down_proj.weight_scale"])


@pytest.mark.parametrize("name", MIXTURES)
def test_compressed_blocks_are_not_offered_for_mixtures_of_experts(pair, tmp_path, name):
    base, post = pair(name)
    with pytest.raises(CheckpointError, match=r"mixture-of-experts.*fp8 container"):
        export_checkpoint(post, base, tmp_path / "out", **VARIANTS["block-compressed"])
    assert not (tmp_path / "out").exists()


def test_gpt2_is_refused_by_the_name_of_its_layers(tmp_path):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.gpt2)
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel has no Linear weight.*Conv1D"):
        export_checkpoint(post, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "post"]


@pytest.mark.parametrize("variant", ["block", "block-ue8m0", "block-compressed", "channel", "channel-a16"])
@pytest.mark.parametrize("role", ["base", "post"])
def test_an_fp8_folder_as_input_is_the_folder_that_it_stands_for(exported, pair, tmp_path, variant, role):
    base, post = pair("qwen2")
    folder = exported("qwen2", variant)
    meant = write_meant(folder, tmp_path / "meant")
    outs = []
    for number, stand_in in enumerate((folder, meant)):
        inputs = (post, stand_in) if role == "base" else (stand_in, base)
        outs.append(tmp_path / f"out{number}")
        report = export_checkpoint(*inputs, outs[-1], scheme="FP8_BLOCK", search=QUICK)
        assert report.notes == ()
    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second
    assert (outs[0] / "config.json").read_text() == (outs[1] / "config.json").read_text()
    assert (outs[0] / "daq_report.json").read_text() == (outs[1] / "daq_report.json").read_text()


@pytest.mark.parametrize("name", MIXTURES)
def test_an_fp8_mixture_of_experts_as_input(exported, pair, tmp_path, name):
    _, post = pair(name)
    folder = exported(name, "block")
    meant = meant_tensors(folder)
    opened = load_checkpoint(folder)
    assert set(opened) == set(meant)
    assert all(torch.equal(opened[key], meant[key]) for key in meant)
    export_checkpoint(post, folder, tmp_path / "out", search=QUICK)


def test_scales_of_activations_and_cache_do_not_outlive_the_quantization_they_belong_to(
    exported, pair, tmp_path
):
    folder = tmp_path / "fp8"
    shutil.copytree(exported("llama", "channel"), folder)
    stored = stored_tensors(folder)
    attention = "model.layers.0.self_attn"
    stored |= {f"{attention}.{end}": torch.ones(1) for end in ("k_scale", "v_scale", "q_proj.input_scale")}
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    export_checkpoint(folder, pair("llama")[0], tmp_path / "out", search=QUICK)
    assert not any(
        key.endswith(("k_scale", "v_scale", "input_scale")) for key in stored_tensors(tmp_path / "out")
    )
    assert load(tmp_path / "out")[1] == {}


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "bfloat16"), ("float16", "float16")])
def test_the_dtype_is_one_that_fp8_readers_compute_in(tmp_path, dtype, expected):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen2, dtype=getattr(torch, dtype))
    report = export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    stored, before = stored_tensors(tmp_path / "out"), stored_tensors(post)
    assert config_of(tmp_path / "out")["dtype"] == expected
    kept = getattr(torch, expected)
    for key in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(stored[key], before[key].to(kept))
    assert any("were cast from float32" in note for note in report.notes) == (dtype == "float32")
    loaded, problems = load(tmp_path / "out")
    assert problems == {}
    assert loaded.dtype == kept
    meant = meant_tensors(tmp_path / "out", kept)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in meant.items())


def test_float32_tensors_of_a_16_bit_checkpoint_stay_float32(pair, tmp_path):
    base, post = (tmp_path / name for name in ("base", "post"))
    for source, target in zip(pair("llama"), (base, post), strict=True):
        shutil.copytree(source, target)
        tensors = stored_tensors(target)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert stored_tensors(tmp_path / "out")["model.norm.weight"].dtype == torch.float32


def test_float32_masters_are_cast_although_one_tensor_is_bfloat16(tmp_path):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.llama, dtype=torch.float32)
    tensors = stored_tensors(post)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    safetensors.torch.save_file(tensors, post / "model.safetensors", {"format": "pt"})
    export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    kept = {tensor.dtype for key, tensor in stored_tensors(tmp_path / "out").items() if "scale" not in key}
    assert kept == {torch.bfloat16, torch.float8_e4m3fn}


def test_tied_embeddings_are_written_once(exported):
    folder = exported("gemma3", "block")
    assert "lm_head.weight" not in stored_tensors(folder)
    assert config_of(folder)["tie_word_embeddings"] is True
    loaded, _ = load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("equal", [True, False])
def test_a_second_copy_of_a_tied_tensor_is_left_out_if_it_is_equal_and_refused_if_not(pair, tmp_path, equal):
    post = tmp_path / "post"
    shutil.copytree(pair("gemma3")[1], post)
    tensors = stored_tensors(post)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    safetensors.torch.save_file(tensors, post / "model.safetensors", {"format": "pt"})
    if equal:
        export_checkpoint(post, pair("gemma3")[0], tmp_path / "out", search=QUICK)
        assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
    else:
        with pytest.raises(
            CheckpointError, match=r"lm_head.weight is tied to model.embed_tokens.weight.*different"
        ):
            export_checkpoint(post, pair("gemma3")[0], tmp_path / "out", search=QUICK)


def test_the_files_beside_the_weights_come_along(exported, pair):
    folder, post = exported("llama", "block"), pair("llama")[1]
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (post / name).read_bytes()
    changed = {"dtype", "quantization_config"}
    before, after = config_of(post), config_of(folder)
    assert {key: before[key] for key in before.keys() - changed} == {
        key: after[key] for key in after.keys() - changed
    }


def test_a_classifier_keeps_its_head(tmp_path):
    def factory():
        config = transformers.LlamaConfig(**tiny_models.TEXT, num_labels=3)
        return transformers.LlamaForSequenceClassification(config)

    base, post = tiny_models.make_pair(tmp_path, factory)
    export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    assert ignored(tmp_path / "out") == ["score"]
    assert load(tmp_path / "out")[1] == {}


def test_a_bare_model_finds_its_base_in_a_folder_with_a_head(tmp_path, pair):
    base, post = pair("llama")
    bare = transformers.LlamaModel.from_pretrained(post)
    bare.save_pretrained(tmp_path / "bare")
    report = export_checkpoint(tmp_path / "bare", base, tmp_path / "out", search=QUICK)
    full = export_checkpoint(post, base, tmp_path / "full", search=QUICK)
    assert [tensor.name for tensor in report.tensors] == [
        tensor.name.removeprefix("model.") for tensor in full.tensors
    ]
    assert report.metrics() == full.metrics()
    assert load(tmp_path / "out")[1] == {}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_base_and_post_may_use_the_two_namings_of_a_vision_language_model(pair, exported, tmp_path, name):
    base, post = pair(name)
    model, _ = load(base)
    model.save_pretrained(tmp_path / "other", save_original_format=False)
    assert set(stored_tensors(tmp_path / "other")) != set(stored_tensors(base))
    report = export_checkpoint(post, tmp_path / "other", tmp_path / "out", search=QUICK, scheme="FP8_BLOCK")
    assert report.notes == ()
    expected = exported(name, "block") / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected.read_bytes()

    post_model, _ = load(post)
    post_model.save_pretrained(tmp_path / "post", save_original_format=False)
    export_checkpoint(tmp_path / "post", base, tmp_path / "out2", search=QUICK, scheme="FP8_BLOCK")
    loaded, problems = load(tmp_path / "out2")
    assert problems == {}
    same, _ = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(same))


def test_ignored_experts_are_listed_as_the_stack_that_transformers_replaces(pair, tmp_path):
    base, post = pair("qwen3_moe")
    export_checkpoint(
        post, base, tmp_path / "out", ignore=[r"re:model\.layers\.0\.mlp\.experts\..*"], search=QUICK
    )
    listed = ignored(tmp_path / "out")
    assert "model.layers.0.mlp.experts" in listed
    assert "model.layers.0.mlp.experts.1.down_proj" in listed
    assert not any(name.startswith("model.layers.1.mlp.experts") for name in listed)
    assert load(tmp_path / "out")[1] == {}


def test_some_experts_of_a_layer_cannot_be_ignored(pair, tmp_path):
    base, post = pair("qwen3_moe")
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.experts.*ignore all of them or none"):
        export_checkpoint(post, base, tmp_path / "out", ignore=[r"re:model\.layers\.0\.mlp\.experts\.1\..*"])


def test_stacked_experts_on_disk_are_kept_and_listed(pair, tmp_path):
    base, post = pair("qwen3_moe")
    stacked = {}
    for role, source in (("base", base), ("post", post)):
        model, _ = load(source)
        model.save_pretrained(tmp_path / role, save_original_format=False)
        stacked[role] = tmp_path / role
    export_checkpoint(stacked["post"], stacked["base"], tmp_path / "out", search=QUICK)
    before, stored = stored_tensors(stacked["post"]), stored_tensors(tmp_path / "out")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(stored[key], before[key])
    assert {f"model.layers.{layer}.mlp.experts" for layer in range(2)} <= set(ignored(tmp_path / "out"))
    assert load(tmp_path / "out")[1] == {}


def test_the_encoder_of_an_encoder_decoder_is_part_of_the_language_model():
    config = transformers.T5Config(
        vocab_size=64, d_model=128, d_kv=64, d_ff=128, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    with torch.device("meta"):
        outline = Architecture(transformers.T5ForConditionalGeneration(config)).outline({})
    for side in ("encoder", "decoder"):
        assert outline.role(f"{side}.block.0.layer.0.SelfAttention.q.weight", 2) == "linear"
    assert outline.role("lm_head.weight", 2) == "head"
