"""Which layers cache keys and values is what compressed-tensors finds, and what is seen of them is what
transformers' own cache holds."""

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from installed import SEES_CACHES

from daq_lightning.model.architecture import Architecture
from daq_lightning.model.in_front import rounded, watched
from daq_lightning.numerics.kv_cache import cached

TOKENS = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(1))


def mistral():
    return tiny_models.mistral(sliding_window=8)


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        )
    )  # fmt: skip


def mamba2():
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1,
            vocab_size=64,
        )
    )  # fmt: skip


KINDS = {
    tiny_models.llama: ["full", "full"],
    tiny_models.qwen2: ["full", "full"],
    tiny_models.qwen3: ["full", "full"],
    tiny_models.phi3: ["full", "full"],
    tiny_models.gemma3: ["sliding", "sliding"],
    tiny_models.qwen3_moe: ["full", "full"],
    tiny_models.mixtral: ["full", "full"],
    tiny_models.llava: ["full", "full"],
    tiny_models.qwen2_vl: ["full", "full"],
    mistral: ["sliding", "sliding"],
    tiny_models.gpt2: ["unknown"],
    bart: ["cross"] * 3,
    tiny_models.deepseek_v3: ["latent", "latent"],
    tiny_models.qwen3_next: ["state", "full"],
    mamba2: ["state"],
}


def kinds_of(model):
    return Architecture(model).outline({}).caches


@pytest.mark.parametrize("factory", KINDS, ids=lambda factory: factory.__name__)
def test_layers_that_cache_something_are_known(factory):
    with torch.device("meta"):
        assert list(kinds_of(factory()).values()) == KINDS[factory]


@SEES_CACHES
@pytest.mark.parametrize("factory", KINDS, ids=lambda factory: factory.__name__)
def test_layers_with_keys_and_values_are_those_of_compressed_tensors(factory):
    with torch.device("meta"):
        model = factory()
    kinds = kinds_of(model)
    found = [name for name, module in model.named_modules() if is_cached_attention_module(module)]
    known = [name for name, kind in kinds.items() if kind in ("full", "sliding")]
    if set(kinds.values()) <= {"full", "sliding", "state"}:
        assert known == found
    else:  # such a model is refused as a whole
        assert not known


def seen_by_numpy(model, tokens):
    """The largest keys and values, as NumPy finds them in transformers' DynamicCache."""
    cache = transformers.DynamicCache()  # of no window: it keeps all tokens
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return [
        tuple(float(np.abs(part.float().numpy()).max()) for part in (layer.keys, layer.values))
        for layer in cache.layers
    ]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "factory", [tiny_models.llama, tiny_models.qwen3, tiny_models.phi3, tiny_models.gemma3, mistral],
    ids=lambda factory: factory.__name__,
)  # fmt: skip
def test_what_is_seen_is_what_the_cache_of_transformers_holds(factory, use_cache):
    torch.manual_seed(0)
    model = factory().bfloat16().eval()
    modules = Architecture(model).modules(kinds_of(model))
    with torch.no_grad():
        plain = model(input_ids=TOKENS, use_cache=use_cache).logits
        with watched(modules) as seen:
            whole = model(input_ids=TOKENS, use_cache=use_cache).logits
            observed = [model(input_ids=part, use_cache=use_cache).logits for part in TOKENS.split(1)]
    assert torch.equal(plain, whole)
    assert len(observed) == 3
    each = [seen_by_numpy(model, part) for part in (*TOKENS.split(1), TOKENS)]
    expected = np.max(np.array(each), axis=0)
    assert np.array_equal(np.array(list(seen.peaks().values())), expected)
    assert list(seen.tokens.values()) == [2 * TOKENS.numel()] * 2


def test_generation_is_seen_too_and_stays_what_it_is():
    torch.manual_seed(0)
    model = tiny_models.llama().eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain = model.generate(TOKENS, **settings)
    with watched(Architecture(model).modules(kinds_of(model))) as seen:
        assert torch.equal(model.generate(TOKENS, **settings), plain)
    assert set(seen.tokens.values()) == {TOKENS.numel() + 3 * 4}


def test_an_error_in_a_forward_leaves_no_trace():
    model = tiny_models.llama()
    modules = Architecture(model).modules(kinds_of(model))
    before = {name: {**vars(module), "_forward_pre_hooks": None} for name, module in modules.items()}
    with pytest.raises(IndexError), watched(modules):
        model(input_ids=TOKENS + 1000)
    for name, module in modules.items():
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert {**vars(module), "_forward_pre_hooks": None} == before[name]


def test_a_layer_that_asks_for_more_than_an_update_is_named():
    class OddAttention(torch.nn.Module):
        def forward(self, x, past_key_values=None):
            return x + past_key_values.get_seq_length()

    module = OddAttention()
    named = r"layers.7: .*get_seq_length.*kv_cache='fp8'"
    with pytest.raises(ValueError, match=named), watched({"layers.7": module}):
        module(torch.ones(1))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rounded_keys_and_values_are_what_a_quantized_cache_would_give(use_cache):
    """The oracle: a cache of transformers that rounds what it is given."""

    class Rounding(transformers.DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = cached(key_states, 0.25), cached(value_states, 0.0078125)
            return super().update(keys, values, layer_idx, *args, **kwargs)

    torch.manual_seed(0)
    model = tiny_models.llama().bfloat16().eval()
    modules = Architecture(model).modules(kinds_of(model))
    with torch.no_grad():
        expected = model(input_ids=TOKENS, past_key_values=Rounding(), use_cache=True).logits
        with rounded(modules, dict.fromkeys(modules, (0.25, 0.0078125))):
            found = model(input_ids=TOKENS, use_cache=use_cache).logits
        plain = model(input_ids=TOKENS, use_cache=use_cache).logits
    assert torch.equal(found, expected)
    assert not torch.equal(plain, expected)
