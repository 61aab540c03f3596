"""An export with an FP8 cache: its readers accept it, its scales are those of transformers' own cache, and
what cannot have one is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import text_models
import tiny_models
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from installed import SEES_CACHES
from safetensors.torch import load_file, save_file

from daq_lightning import Chain, CheckpointError, ExportReport, ScaleSearch, export_checkpoint
from daq_lightning.audit.evaluate import evaluate
from daq_lightning.audit.verify import run_checks
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.cli import main
from daq_lightning.export.job import plan_of
from daq_lightning.export.kv_cache import cached_modules, found_scales
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source

QUICK = ScaleSearch(metric="cosine", n_coarse=2, n_fine=0)
SCALES = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair of models with a tokenizer, a text, and an export of each kind."""
    folder = tmp_path_factory.mktemp("made")
    base, post = tiny_models.make_pair(folder, tiny_models.llama)
    text_models.save_tokenizer(post)
    text = text_models.write_text(folder / "text.jsonl")
    for name, cache in (("plain", {}), ("fp8", {"kv_cache": "fp8"}),
                        ("found", {"kv_cache": "fp8-calibrated", "kv_text": text})):  # fmt: skip
        export_checkpoint(post, base, folder / name, scheme="FP8_DYNAMIC", search=QUICK, **cache)
    return folder


def gpt_neox():
    """One projection makes queries, keys and values in turn."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
        )
    )


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


def test_scales_are_those_that_numpy_finds_in_the_cache_of_transformers(made):
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "post", dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "post")
    peaks = np.zeros((2, 2))
    tokens = 0
    for line in (made / "text.jsonl").read_text().splitlines():
        entry = json.loads(line)
        text = entry.get("text") or tokenizer.apply_chat_template(entry["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens="text" in entry).input_ids
        for start in range(0, len(ids), 64):  # as many as the model takes
            if len(ids[start : start + 64]) < 2:
                continue
            tokens += len(ids[start : start + 64])
            cache = transformers.DynamicCache()
            with torch.no_grad():
                model(input_ids=torch.tensor([ids[start : start + 64]]), past_key_values=cache)
            found = [
                [np.abs(part.float().numpy()).max() for part in (layer.keys, layer.values)]
                for layer in cache.layers
            ]
            peaks = np.maximum(peaks, found)
    stored = tensors(made / "found")
    scales = np.array([stored[name].item() for name in SCALES]).reshape(2, 2)
    # a window alone or beside others is summed in another order, by a bfloat16 of rounding
    assert (np.abs(scales * 448 / peaks - 1) < 2**-6).all()
    report = ExportReport.load(made / "found").kv_cache
    assert report.tokens == tokens
    assert [scale for pair in report.layers.values() for scale in pair] == scales.ravel().tolist()


def test_both_readers_see_a_scheme_and_both_scales_of_each_layer(made):
    for name, value in (("fp8", 1.0), ("found", None)):
        scheme = QuantizationConfig.model_validate(config(made / name)["quantization_config"]).kv_cache_scheme
        assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
        assert scheme.symmetric
        assert scheme.dynamic is False
        stored = tensors(made / name)
        assert sorted(set(stored) - set(tensors(made / "plain"))) == sorted(SCALES)
        for scale in SCALES:
            assert (stored[scale].dtype, tuple(stored[scale].shape)) == (torch.float32, (1,))
            assert value is None or stored[scale].item() == value
    assert config(made / "plain")["quantization_config"]["kv_cache_scheme"] is None


def test_weights_are_those_of_an_export_without_a_cache(made):
    plain = tensors(made / "plain")
    for name in ("fp8", "found"):
        stored = tensors(made / name)
        assert all(
            torch.equal(stored[key].view(torch.uint8), tensor.view(torch.uint8))
            for key, tensor in plain.items()
        )


@SEES_CACHES
@tiny_models.DEQUANTIZES
def test_transformers_loads_it_and_answers_the_same_where_it_does_not_quantize_the_cache(made):
    tokens = torch.randint(3, 28, (2, 20), generator=torch.Generator().manual_seed(0))
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    answers = {}
    for name in ("plain", "fp8", "found"):
        model, found = load(made / name, quantization_config=dense)
        assert not found["missing_keys"]
        with torch.no_grad():
            answers[name] = model(tokens).logits
    assert torch.equal(answers["fp8"], answers["plain"])
    assert torch.equal(answers["found"], answers["plain"])
    for name in ("fp8", "found"):
        model, found = load(made / name)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        stored, own = tensors(made / name), dict(model.named_parameters())
        assert all(own[scale].float().item() == stored[scale].item() for scale in SCALES)
        with torch.no_grad():
            assert bool(model(tokens).logits.isfinite().all())


@SEES_CACHES
def test_an_evaluation_rounds_keys_and_values_as_transformers_does(made, tmp_path):
    """With scales of 1 and activations in 16 bit the two forwards differ in nothing."""
    out, windows = tmp_path / "out", [list(range(3, 23))]
    export_checkpoint(made / "post", made / "base", out, scheme="FP8A16", kv_cache="fp8", search=QUICK)
    files = {"export": Checkpoint(out), "post": Checkpoint(made / "post")}
    found = evaluate(files, windows)
    assert found.kv_cache
    assert not found.unseen
    tokens = torch.tensor(windows)
    with torch.no_grad():
        served = load(out)[0](tokens).logits[0, :-1].double().log_softmax(-1)
        post = load(made / "post", dtype=torch.bfloat16)[0](tokens).logits[0, :-1].double()
    kld = (post.softmax(-1) * (post.log_softmax(-1) - served)).sum(-1).mean()
    assert found.figures["kld_mean"] == pytest.approx(float(kld), rel=1e-6)
    weights_only = evaluate(files, windows, weights_only=True)
    assert not weights_only.kv_cache
    assert weights_only.figures["kld_mean"] != pytest.approx(float(kld), rel=1e-2)


def damaged(made, folder, change):
    shutil.copytree(made / "found", folder)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    change(stored)
    save_file(stored, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda stored: stored.pop(SCALES[1]), "v_scale missing"),
        (lambda stored: stored.update({SCALES[0]: torch.zeros(1)}), "expected a finite number > 0"),
        (lambda stored: stored.update({SCALES[0]: torch.tensor([float("nan")])}), "finite number > 0"),
        (lambda stored: stored.update({SCALES[2]: torch.tensor([0.1])}), "bfloat16 cannot hold"),
        (lambda stored: stored.update({SCALES[2]: torch.ones(2)}), "one float32 number"),
        (lambda stored: stored.update({"model.norm.k_scale": torch.ones(1)}), "the scale of nothing"),
    ],
)
def test_verify_finds_scales_that_are_missing_or_wrong(made, tmp_path, change, problem):
    checks = {check.name: check.problems for check in run_checks(damaged(made, tmp_path / "odd", change))}
    assert any(problem in found for found in checks["KV cache"]), checks


def test_verify_knows_the_scheme_and_finds_no_fault_with_an_export(made, tmp_path):
    for name in ("plain", "fp8", "found"):
        assert not any(check.problems or check.skipped for check in run_checks(made / name))
    shutil.copytree(made / "fp8", tmp_path / "odd")
    content = config(tmp_path / "odd")
    content["quantization_config"]["kv_cache_scheme"] |= {"strategy": "attn_head"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(content))
    problems = {check.name: check.problems for check in run_checks(tmp_path / "odd")}
    assert "attn_head" in problems["KV cache"][0]


def test_an_export_with_a_cache_is_a_base_like_any_other(made, tmp_path):
    export_checkpoint(made / "post", made / "found", tmp_path / "next", scheme="FP8_DYNAMIC", search=QUICK)
    assert not set(SCALES) & set(tensors(tmp_path / "next"))
    assert not run_checks_problems(tmp_path / "next")


def test_in_several_files_it_is_the_same_export_and_the_audits_find_it_intact(made, tmp_path, capsys):
    cache = {"kv_cache": "fp8-calibrated", "kv_text": made / "text.jsonl"}
    out = tmp_path / "out"
    export_checkpoint(
        made / "post", made / "base", out, scheme="FP8_DYNAMIC", search=QUICK, max_shard_bytes=60_000, **cache
    )
    assert len(list(out.glob("*.safetensors"))) > 3
    one, other = tensors(out), tensors(made / "found")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    assert not run_checks_problems(out)
    assert Chain.open(out).verify() == []
    assert main(["inspect", str(out), "--base", str(made / "base"), "--post", str(made / "post")]) == 0
    assert "14 of 14 weights agree" in capsys.readouterr().out


def run_checks_problems(folder):
    return [problem for check in run_checks(folder) for problem in check.problems]


def test_the_command_says_it_and_its_recipe_makes_it_again(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    options = ["--kv-cache", "fp8-calibrated", "--kv-text", "text.jsonl", "--n-coarse", "2", "--n-fine", "0"]
    assert main(["quantize", "post", "--base", "base", "--out", "out", *options]) == 0
    assert "KV cache: FP8 (E4M3) in 2 attention layers, scales from" in capsys.readouterr().out
    card = (tmp_path / "made" / "out" / "README.md").read_text()
    assert "vllm serve MODEL --kv-cache-dtype fp8" in card
    assert "- KV cache: FP8" in card
    assert "KV cache" in (tmp_path / "made" / "out" / "daq_report.html").read_text()
    monkeypatch.chdir(tmp_path / "made" / "out")
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    again = tmp_path / "made" / "made-again"
    for file in (tmp_path / "made" / "out").iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kv-cache fp8-calibrated", "--kv-cache fp8-calibrated needs a text"),
        ("--kv-text text.jsonl", "pass both, or none"),
        ("--kv-cache fp8 --container fp8", "no reader looks for it in the fp8 container"),
        ("--kv-cache fp8-calibrated --kv-text absent.txt", "absent.txt is not there"),
    ],
)
def test_what_does_not_belong_together_is_said_before_anything_is_written(
    made, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(made)
    out = tmp_path / "out"
    assert main(["quantize", "post", "--base", "base", "--out", str(out), *options.split()]) == (
        1 if "absent" in options else 2
    )
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (tiny_models.deepseek_v3, r"model.layers.0.self_attn and 1 more of DeepseekV3ForCausalLM.*MLA"),
        (
            gpt_neox,
            r"gpt_neox.layers.0.attention of GPTNeoXForCausalLM .* for which transformers and vLLM have no",
        ),
    ],
)
def test_models_with_other_caches_are_refused_by_name(tmp_path, factory, message):
    base, post = tiny_models.make_pair(tmp_path, factory)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(post, base, tmp_path / "out", kv_cache="fp8", search=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_mapping_of_tensors_has_no_layers_to_speak_of(tmp_path):
    weights = {"layer.weight": torch.randn(8, 8)}
    with pytest.raises(CheckpointError, match="no attention that transformers knows"):
        export_checkpoint(weights, weights, tmp_path / "out", kv_cache="fp8")


def test_layers_without_keys_and_layers_with_a_window_are_named(tmp_path):
    base, post = tiny_models.make_pair(tmp_path, tiny_models.qwen3_next)
    report = export_checkpoint(post, base, tmp_path / "out", kv_cache="fp8", search=QUICK)
    assert list(report.kv_cache.layers) == ["model.layers.1.self_attn"]
    assert any("1 layers cache no keys and values, such as model.layers.0" in note for note in report.notes)
    assert report.scheme == "FP8_DYNAMIC"  # experts, which compressed-tensors holds per channel
    assert not run_checks_problems(tmp_path / "out")
    with pytest.raises(CheckpointError, match="scheme='FP8_DYNAMIC'"):
        export_checkpoint(post, base, tmp_path / "no", kv_cache="fp8", scheme="FP8_BLOCK", search=QUICK)


@SEES_CACHES
def test_scales_have_the_names_that_the_checkpoint_has(tmp_path):
    """On disk the language model of Llava has other names than in memory; transformers finds its scales."""
    base, post = tiny_models.make_pair(tmp_path, tiny_models.llava)
    export_checkpoint(post, base, tmp_path / "out", kv_cache="fp8", search=QUICK, scheme="FP8_DYNAMIC")
    model, found = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    scales = [
        value.item() for name, value in model.named_parameters() if name.endswith(("k_scale", "v_scale"))
    ]
    assert scales == [1.0] * 4
    assert not run_checks_problems(tmp_path / "out")


def test_windows_are_named_and_a_layer_that_is_not_seen_is_no_scale(tmp_path):
    base, _ = tiny_models.make_pair(tmp_path, tiny_models.gemma3)
    plan = plan_of(Source.from_folder(base), ExportSettings(kv_cache="fp8-calibrated"))
    assert any("2 of 2 attention layers look back over a window" in note for note in plan.notes)
    first, second = cached_modules(plan)
    about = {"found_on": "a text", "tokens": 1}
    with pytest.raises(ValueError, match=f"Nothing entered the caches of {second} on a text"):
        found_scales(plan, {first: (1.0, 1.0)}, **about)
    with pytest.raises(ValueError, match=f"{second} cached NaN or Inf"):
        found_scales(plan, {first: (1.0, 1.0), second: (1.0, float("nan"))}, **about)


def test_a_report_of_another_form_is_refused(made, tmp_path):
    content = json.loads((made / "found" / "daq_report.json").read_text())
    loaded = ExportReport.load(made / "found")
    assert loaded.kv_cache == ExportReport.load(made / "found").kv_cache
    assert dataclasses.replace(loaded, kv_cache=None).to_dict().get("kv_cache") is None
    content["kv_cache"]["layers"]["model.layers.0.self_attn"] = {"k_scale": 1.0}
    (tmp_path / "daq_report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="two scales of each layer"):
        ExportReport.load(tmp_path)
