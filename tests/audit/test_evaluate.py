"""An export judged on a text, against plain transformers models and NumPy in float64."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers

from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit import evaluate as evaluating
from daq_lightning.audit.evaluate import evaluate
from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.model.activations import quantized_activations
from daq_lightning.model.halves import Halves
from daq_lightning.model.tokens import most_tokens

QUICK = ScaleSearch(n_coarse=2, n_fine=1)


def gemma2(**changes):
    """Capped logits, tied embeddings."""
    config = transformers.Gemma2Config(
        **(tiny_models.TEXT | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 128} | changes)
    )
    return transformers.Gemma2ForCausalLM(config)


def granite():
    """Logits divided by a number of the config."""
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**(tiny_models.TEXT | {"logits_scaling": 3.0}))
    )


FAMILIES = {
    "llama": tiny_models.llama,
    "qwen2 tied": lambda: tiny_models.qwen2(tie_word_embeddings=True),
    "gemma2": gemma2,
    "granite": granite,
    "qwen3_moe": lambda: tiny_models.qwen3_moe(num_experts=4, num_experts_per_tok=2),
}


def exported(folder, factory, scheme="FP8_BLOCK", size=0.02):
    base, post = tiny_models.make_pair(folder, factory, size=size)
    export_checkpoint(post, base, folder / "out", scheme=scheme, search=QUICK)
    return {"base": base, "post": post, "export": folder / "out"}


def opened(paths):
    return {role: load_checkpoint(path) for role, path in paths.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("llama"), tiny_models.llama)


def windows_of(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(tiny_models.VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def plain_model(path):
    """As a user of transformers loads it; FP8 codes dequantized by transformers itself."""
    quantized = "quantization_config" in json.loads((Path(path) / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        experts_implementation="eager",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True) if quantized else None,
    )
    return model.eval()


def quantized_in(model):
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    return linears + [module for name, module in model.named_modules() if name.endswith("mlp.experts")]


@torch.no_grad()
def log_probabilities(model, windows):
    """Of all places with a next token, in float64."""
    found = []
    for window in windows:
        logits = model(torch.tensor([window[:-1]])).logits[0].double().numpy()
        shifted = logits - logits.max(-1, keepdims=True)
        found.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return np.concatenate(found)


def expected_figures(b, p, q, windows):
    """The definitions, over all tokens at once."""
    target = np.concatenate([window[1:] for window in windows])
    at = np.arange(len(target))
    kld = (np.exp(p) * (p - q)).sum(-1)
    nll, nll_ref = -q[at, target], -p[at, target]
    delta_p = np.exp(q[at, target]) - np.exp(p[at, target])
    top_b, top_p, top_q = (log.argmax(-1) for log in (b, p, q))
    changed = top_b != top_p
    update, error = p - b, q - p
    update = update - (np.exp(p) * update).sum(-1, keepdims=True)
    error = error - (np.exp(p) * error).sum(-1, keepdims=True)
    dot, update_sq, error_sq = ((np.exp(p) * part).sum() for part in (update * error, update**2, error**2))
    along = dot**2 / update_sq / error_sq
    return {
        "kld_mean": kld.mean(),
        "kld_mean_error": kld.std() / np.sqrt(len(kld) - 1),
        "kld_max": kld.max(),
        "perplexity": np.exp(nll.mean()),
        "reference_perplexity": np.exp(nll_ref.mean()),
        "perplexity_ratio": np.exp((nll - nll_ref).mean()),
        "base_perplexity": np.exp(-b[at, target].mean()),
        "recovery": (-b[at, target].mean() - nll.mean()) / (-b[at, target].mean() - nll_ref.mean()),
        "delta_p_mean": delta_p.mean(),
        "delta_p_rms": np.sqrt((delta_p**2).mean()),
        "same_top": (top_q == top_p).mean(),
        "flipped_wrong": ((top_p == target) & (top_q != target)).mean(),
        "flipped_right": ((top_p != target) & (top_q == target)).mean(),
        "top_changed": changed.mean(),
        "top_kept": (top_q == top_p)[changed].mean(),
        "top_reverted": (top_q == top_b)[changed].mean(),
        "top_disturbed": (top_q != top_p)[~changed].mean(),
        "update_gain": 1 + dot / update_sq,
        "kld_along": along * kld.mean(),
        "kld_across": (1 - along) * kld.mean(),
    }


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_figures_are_those_of_plain_transformers_models(family, weights_only, tmp_path, monkeypatch):
    size = 0.003 if family == "qwen3_moe" else 0.02  # so that some tops change, and not all
    paths, windows = exported(tmp_path, FAMILIES[family], size=size), windows_of(24, 24, 24)
    models = {role: plain_model(path) for role, path in paths.items()}
    b, p = (log_probabilities(models[role], windows) for role in ("base", "post"))
    scheme = SCHEMES["FP8A16" if weights_only else "FP8_BLOCK"]
    with quantized_activations(quantized_in(models["export"]), scheme):
        q = log_probabilities(models["export"], windows)
    # one window at a time, as above, for products of another size may be summed in another order
    monkeypatch.setattr(evaluating, "_PIECE", 23 * tiny_models.VOCABULARY)
    found = evaluate(opened(paths), windows, weights_only=weights_only, batch_size=1)
    expected = expected_figures(b, p, q, windows)
    assert 0 < expected["top_changed"] < 1
    for name, value in expected.items():
        assert found.figures[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert found.tokens == 3 * 23
    assert found.changed == round(expected["top_changed"] * 69)
    assert found.quantized_activations is not weights_only
    assert found.unseen == ()


def test_activations_in_fp8_cost_more_than_weights_alone(llama):
    windows = windows_of(60, 60)
    served, weights = (evaluate(opened(llama), windows, weights_only=only) for only in (False, True))
    assert served.figures["kld_mean"] > 1.1 * weights.figures["kld_mean"]


def test_an_export_of_no_change_is_not_called_an_update(llama):
    found = evaluate(opened(llama | {"base": llama["post"]}), windows_of(30))
    assert found.changed == 0
    assert np.isnan(found.figures["top_kept"])


def test_base_may_be_left_out_and_the_models_be_one(llama):
    same = {"export": llama["export"], "post": llama["export"]}
    found = evaluate(opened(same), windows_of(30), weights_only=True)
    assert found.changed is None
    assert found.figures["kld_mean"] == 0
    assert found.figures["same_top"] == 1
    assert "top_kept" not in found.figures


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("piece", [1, 5 * tiny_models.VOCABULARY, 2**24])
def test_any_cut_of_the_stream_gives_the_same_figures(llama, batch_size, piece, monkeypatch):
    # in float32, where products of another size do not turn near ties around
    monkeypatch.setattr(evaluating, "_dtype_of", lambda files: torch.float32)
    windows = windows_of(9, 2, 40, 17, 40, 3)
    whole = evaluate(opened(llama), windows, weights_only=True)
    monkeypatch.setattr(evaluating, "_PIECE", piece)
    found = evaluate(opened(llama), windows, weights_only=True, batch_size=batch_size)
    assert found.tokens == whole.tokens == 105
    for name, value in whole.figures.items():
        assert found.figures[name] == pytest.approx(value, rel=1e-3, abs=1e-7, nan_ok=True), name


def test_logits_of_one_piece_and_the_body_of_one_model_are_in_memory(llama, monkeypatch):
    pieces, bodies, alive = [], [], []
    logits, hidden = Halves.logits, Halves.hidden

    def counted(self, hidden_RH):
        result = logits(self, hidden_RH)
        pieces.append(weakref.ref(result))
        sizes.append(len(result))
        return result

    def watched(self, tokens_BT):
        if not any(body() is self._body for body in bodies):
            gc.collect()
            alive.append(sum(body() is not None for body in bodies))
            bodies.append(weakref.ref(self._body))
        alive_pieces.append(sum(piece() is not None for piece in pieces))
        return hidden(self, tokens_BT)

    sizes, alive_pieces = [], []
    monkeypatch.setattr(Halves, "logits", counted)
    monkeypatch.setattr(Halves, "hidden", watched)
    monkeypatch.setattr(evaluating, "_PIECE", 7 * tiny_models.VOCABULARY)
    evaluate(opened(llama), windows_of(40, 40))
    assert alive == [0, 0, 0]
    assert max(sizes) <= 8  # seven of a piece, eight where a model is tried
    assert max(alive_pieces) <= 1
    assert sum(sizes) >= 3 * 78


def test_a_post_in_fp8_and_a_channel_scheme_work(llama, tmp_path):
    export_checkpoint(llama["export"], llama["base"], tmp_path / "out", scheme="FP8_DYNAMIC", search=QUICK)
    paths = {"post": llama["export"], "base": llama["base"], "export": tmp_path / "out"}
    found = evaluate(opened(paths), windows_of(40))
    assert found.scheme == "FP8_DYNAMIC"
    assert 0 < found.figures["kld_mean"] < 0.2


def bert():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
        )
    )


def classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**tiny_models.TEXT))


@pytest.mark.parametrize(
    ("factory", "message"),
    [(bert, "predicts no next token"), (classifier, "more than the hidden states of its body")],
)
def test_a_model_that_is_no_causal_language_model_is_refused(factory, message, tmp_path):
    paths = exported(tmp_path, factory)
    with pytest.raises(ValueError, match=f"base: .*{message}|/base: .*{message}"):
        evaluate(opened(paths), windows_of(12))


def test_other_vocabularies_and_foreign_tokens_are_refused(llama, tmp_path):
    other, _ = tiny_models.make_pair(tmp_path, tiny_models.llama, vocab_size=80)
    with pytest.raises(ValueError, match=r"different sizes \(.*base 80"):
        evaluate(opened(llama | {"base": other}), windows_of(12))
    with pytest.raises(ValueError, match="token 99, but the models have 64"):
        evaluate(opened(llama), [[1, 99, 2]])


def test_the_length_that_a_model_takes_is_that_of_its_config():
    assert most_tokens({"max_position_embeddings": 64}) == 64
    assert most_tokens({"text_config": {"max_position_embeddings": 32}}) == 32
    assert most_tokens({"n_positions": 16}) == 16
    assert most_tokens({}) is None
