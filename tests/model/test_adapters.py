"""PEFT adapters: names, frozen and merged weights; held against PEFT itself, NumPy in float64, and
transformers."""

import copy
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from installed import needs_add_adapter
from lightning import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from daq_lightning.checkpoint.adapter import read_adapter
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.adapters.merged import find_adapters
from daq_lightning.model.adapters.save import save_adapter
from daq_lightning.numerics.lora import LoraFactors, merge_lora, merge_lora_bias, merge_lora_experts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
Q = "model.layers.0.self_attn.q_proj.weight"

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, on tied embeddings and fan_in_fan_out
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


def llama(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)


def qwen2(tied=True):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32))


def train(model, seed=1):
    """Stands for training: moves everything trainable, tied factors once."""
    generator, seen = torch.Generator().manual_seed(seed), set()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def lora(model, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    return train(get_peft_model(model, LoraConfig(**settings)))


CASES = {
    "llama": lambda: lora(llama()),
    "rank 16, rsLoRA": lambda: lora(llama(), r=16, use_rslora=True),
    "patterns": lambda: lora(
        llama(), rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={r".*\.1\.mlp\.down_proj": 20}
    ),
    "dora": lambda: lora(llama(), use_dora=True),
    "dora on embedding": lambda: lora(llama(), use_dora=True, target_modules=["embed_tokens", "v_proj"]),
    "embedding and head": lambda: lora(llama(), target_modules=["embed_tokens", "lm_head"]),
    "conv1d": lambda: lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "conv1d, dora": lambda: lora(
        gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True
    ),
    "qwen2, lora bias": lambda: lora(qwen2(), target_modules=["q_proj", "v_proj"], lora_bias=True),
    "modules to save": lambda: lora(llama(), modules_to_save=["lm_head", "norm"]),
    "tied, trained as one": lambda: lora(
        llama(tied=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def adapted(request):
    return request.param()


def reference(layer, adapter, base):
    """The merged weight of a LoRA or DoRA layer, in NumPy float64, from the definition."""
    embedding = hasattr(layer.get_base_layer(), "num_embeddings")
    A = layer.lora_embedding_A[adapter] if embedding else layer.lora_A[adapter].weight
    B = layer.lora_embedding_B[adapter] if embedding else layer.lora_B[adapter].weight
    A, B, weight = (t.detach().double().numpy() for t in (A, B, base))
    transposed = embedding or layer.fan_in_fan_out
    alpha, rank = layer.lora_alpha[adapter], layer.r[adapter]
    scaling = alpha / math.sqrt(rank) if layer.use_rslora[adapter] else alpha / rank
    merged = (weight.T if transposed else weight) + scaling * B @ A
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach().double().numpy()
        merged = merged * (magnitude / np.sqrt((merged**2).sum(1)))[:, None]
    return merged.T if transposed else merged


def lora_layers(model):
    """Name of the weight in the checkpoint and LoRA layer, by PEFT's own naming."""
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            yield name.removeprefix("base_model.model.") + ".weight", layer


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def bits(model):
    return {
        name: (tensor.dtype, tensor.detach().contiguous().view(torch.uint8).clone(), tensor.data_ptr())
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


class Module(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model


class TestMergedWeights:
    def test_names_and_order_are_those_of_the_model_without_adapters(self, adapted):
        found = find_adapters(Module(adapted))
        names = list(adapted.unload().state_dict())
        assert list(found.weights) == names
        assert list(found.base) == names
        assert len(found.weights) == len(names)

    def test_weight_and_delta_equal_float64(self, adapted):
        found, checked = find_adapters(adapted), 0
        for name, layer in lora_layers(adapted):
            expected, base = reference(layer, "default", found.base[name]), found.base[name].double().numpy()
            merged = found.weights[name]
            assert merged.dtype == torch.float32
            assert name in found.adapted
            # float32 is reached by one rounding; DoRA also rounds the factor and the product
            roundings = 3 if "default" in layer.lora_magnitude_vector else 1
            assert (np.abs(merged.numpy() - expected) <= roundings * 2**-24 * 1.0001 * np.abs(expected)).all()
            assert relative(merged.double().numpy() - base, expected - base) < 1e-6
            checked += 1
        assert checked

    def test_equals_merge_and_unload(self, adapted):
        found = find_adapters(adapted)
        mine = {name: tensor.clone() for name, tensor in found.weights.items()}
        theirs = copy.deepcopy(adapted).merge_and_unload().state_dict()
        assert list(mine) == list(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6 * float(tensor.abs().max()))

    def test_adapted_names_are_those_that_differ(self, adapted):
        found = find_adapters(adapted)
        assert found.adapted == tuple(
            n for n in found.base if not torch.equal(found.weights[n], found.base[n])
        )
        assert found.displaced == ()

    def test_merged_model_computes_what_the_adapted_one_does(self, adapted):
        found = find_adapters(adapted)
        tokens = torch.arange(20)[None]
        expected = adapted.eval()(tokens).logits
        weights = {name: tensor.clone() for name, tensor in found.weights.items()}
        plain = adapted.unload()
        plain.load_state_dict(weights)
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)

    def test_unadapted_tensors_and_base_are_the_ones_in_memory(self, adapted):
        found = find_adapters(adapted)
        pointers = {tensor.data_ptr() for tensor in adapted.state_dict().values()}
        for name in found.base:
            assert found.base[name].data_ptr() in pointers
            if name not in found.adapted:
                assert found.weights[name].data_ptr() == found.base[name].data_ptr()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_base_is_merged_in_float32(self, dtype):
        model = lora(llama(dtype=dtype))
        found = find_adapters(model)
        for name, layer in lora_layers(model):
            assert found.base[name].dtype == dtype
            assert found.weights[name].dtype == torch.float32
            expected, base = reference(layer, "default", found.base[name]), found.base[name].double().numpy()
            assert relative(found.weights[name].double().numpy() - base, expected - base) < 1e-6

    def test_reduced_precision_products_do_not_reach_the_merge(self):
        model = lora(llama())
        exact = find_adapters(model).weights[Q]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(find_adapters(model).weights[Q], exact)
        finally:
            torch.set_float32_matmul_precision(before)

    def test_several_active_adapters_are_summed(self):
        model = lora(llama())
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], use_rslora=True))
        model.base_model.set_adapter(["default", "second"])
        train(model, seed=2)
        merged = find_adapters(model).weights[Q]
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        base = layer.base_layer.weight.detach().double().numpy()
        expected = reference(layer, "default", layer.base_layer.weight)
        expected = expected + reference(layer, "second", layer.base_layer.weight) - base
        assert relative(merged, expected) < 1e-7
        theirs = copy.deepcopy(model).merge_and_unload().state_dict()[Q]
        torch.testing.assert_close(merged, theirs, rtol=1e-6, atol=1e-6)
        model.set_adapter("second")
        assert find_adapters(model).adapted == (Q, Q.replace("layers.0", "layers.1"))

    def test_experts_adapted_by_target_parameters(self):
        class Experts(nn.Module):
            def __init__(self, is_transposed):
                super().__init__()
                self.is_transposed = is_transposed
                self.up = nn.Parameter(torch.randn(3, 8, 12))
                self.down = nn.Parameter(torch.randn(3, 12, 8))

        class Block(nn.Module):
            def __init__(self, is_transposed):
                super().__init__()
                self.router, self.experts = nn.Linear(8, 3), Experts(is_transposed)

        for is_transposed in (False, True):
            torch.manual_seed(0)
            block = nn.ModuleDict({"mlp": Block(is_transposed)})
            names = list(block.state_dict())
            config = LoraConfig(
                r=2, target_modules=["router"], target_parameters=["experts.up", "experts.down"]
            )
            model = train(get_peft_model(block, config))
            found = find_adapters(model)
            assert list(found.weights) == names
            mine = {name: found.weights[name] for name in names}
            for name, tensor in model.merge_and_unload().state_dict().items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)
            assert {"mlp.experts.up", "mlp.experts.down", "mlp.router.weight"} == set(found.adapted)


class TestLiveModel:
    def test_is_only_read(self, adapted):
        adapted.train()
        before, flags = bits(adapted), [p.requires_grad for p in adapted.parameters()]
        random = torch.get_rng_state()
        found = find_adapters(adapted)
        for name in found.weights:
            for tensor in (found.weights[name], found.base[name]):
                assert not tensor.requires_grad
                assert tensor.grad_fn is None
        after = bits(adapted)
        assert before.keys() == after.keys()
        for name, (dtype, data, pointer) in before.items():
            assert after[name][0] == dtype
            assert torch.equal(after[name][1], data)
            assert after[name][2] == pointer
        assert [p.requires_grad for p in adapted.parameters()] == flags
        assert torch.equal(torch.get_rng_state(), random)
        assert all(module.training for module in adapted.modules())

    def test_nothing_is_kept_between_accesses(self):
        model = lora(llama())
        found = find_adapters(model)
        first = found.weights[Q]
        assert found.weights[Q].data_ptr() != first.data_ptr()
        train(model, seed=3)
        assert not torch.equal(found.weights[Q], first)
        layer = dict(lora_layers(model))[Q]
        assert relative(found.weights[Q], reference(layer, "default", layer.base_layer.weight)) < 1e-7

    def test_training_goes_on_bit_identically(self):
        def fit(look):
            model = lora(llama(), lora_dropout=0.1)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            torch.manual_seed(5)
            for _ in range(3):
                tokens = torch.randint(0, 96, (2, 8))
                model(tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if look:
                    found = find_adapters(model)
                    [found.weights[name] for name in found.adapted]
            return bits(model)

        plain, looked = fit(False), fit(True)
        assert all(torch.equal(plain[name][1], looked[name][1]) for name in plain)


class TestFindsAdapters:
    def names(self, module):
        return list(find_adapters(module).weights)

    def test_injected_layers_like_a_peft_model(self):
        needs_add_adapter()
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        expected = find_adapters(lora(llama()))
        added = llama()
        added.add_adapter(config)
        injected = llama()
        inject_adapter_in_model(config, injected)
        for model in (train(added), train(injected)):
            found = find_adapters(Module(model))
            assert found.model is model
            assert found.adapted == expected.adapted
            assert list(found.weights) == list(expected.weights) == list(llama().state_dict())
            for name in found.weights:
                assert torch.equal(found.weights[name], expected.weights[name])
                assert torch.equal(found.base[name], expected.base[name])

    def test_plain_modules(self):
        plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        plain.register_buffer("scratch", torch.ones(2), persistent=False)
        names = list(plain.state_dict())
        model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"]))
        found = find_adapters(Module(model))
        assert list(found.weights) == names
        assert found.model is plain

    def test_peft_model_inside_a_larger_transformers_model(self):
        model = llama()
        names = list(model.state_dict())
        model.model = get_peft_model(model.model, LoraConfig(r=4, target_modules=["q_proj"]))
        found = find_adapters(Module(train(model)))
        assert found.model is model
        assert list(found.weights) == names

    def test_compiled_and_checkpointed_modules_keep_their_names(self):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model = lora(llama())
        names = self.names(model)
        layers = model.base_model.model.model.layers
        layers[0], layers[1] = checkpoint_wrapper(layers[0]), torch.compile(layers[1])
        assert self.names(Module(torch.compile(model))) == names

    def test_none_without_peft_layers(self):
        assert find_adapters(Module(llama())) is None

    def test_peft_is_not_imported_for_a_plain_model(self):
        code = (
            "import sys, torch, daq_lightning.model.adapters.merged as a, daq_lightning.checkpoint.adapter\n"
            "assert a.find_adapters(torch.nn.Linear(2, 2)) is None\n"
            "assert not {'peft', 'transformers'} & set(sys.modules), 'imported'"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_fully_sharded_parts_are_gathered(self, tmp_path):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        model = lora(llama())
        expected = find_adapters(model).weights[Q]
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            found = find_adapters(model)
            assert isinstance(model.base_model.model.get_submodule(Q.removesuffix(".weight")).weight, DTensor)
            assert torch.equal(found.weights[Q], expected)
            assert torch.equal(found.weights.on(Q, 0), expected)
            assert found.weights.on(Q, 1) is None
            save_adapter(model, tmp_path / "adapter")
            assert torch.equal(read_adapter(tmp_path / "adapter").merged(Q, found.base[Q]), expected)
        finally:
            torch.distributed.destroy_process_group()


class TestBase:
    def test_tensors_trained_in_place_are_not_passed_off_as_the_base(self):
        model = lora(qwen2(tied=False), target_modules=["q_proj"], bias="lora_only")
        model.base_model.model.model.norm.weight.requires_grad_(True)
        found = find_adapters(model)
        biases = [n for n in found.base if n.endswith("q_proj.bias")]
        assert found.displaced == (*biases, "model.norm.weight")
        with pytest.raises(ValueError, match=r"model\.norm\.weight is trained in place.*base='snapshot'"):
            found.base["model.norm.weight"]
        assert found.weights["model.norm.weight"] is not None
        assert "model.norm.weight" in found.base

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
    def test_moved_by_the_initialisation_is_not_the_base(self, init):
        original = llama().state_dict()
        model = lora(llama(), init_lora_weights=init)
        found = find_adapters(model)
        assert Q in found.displaced
        with pytest.raises(ValueError, match="is not the base: init_lora_weights"):
            found.base[Q]
        layer = dict(lora_layers(model))[Q]
        assert relative(found.weights[Q], reference(layer, "default", layer.base_layer.weight)) < 1e-7
        assert relative(layer.base_layer.weight.detach(), original[Q].double().numpy()) > 0.01
        assert torch.equal(found.base["model.norm.weight"], original["model.norm.weight"])

    @pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
    def test_other_initialisations_leave_the_base(self, init):
        original = llama().state_dict()
        found = find_adapters(lora(llama(), init_lora_weights=init))
        assert found.displaced == ()
        assert all(torch.equal(found.base[name], original[name]) for name in original)


class TestTies:
    def test_intact_tie_lists_both_names(self):
        found = find_adapters(lora(qwen2()))
        assert (
            found.weights["lm_head.weight"].data_ptr()
            == found.weights["model.embed_tokens.weight"].data_ptr()
        )

    @pytest.mark.parametrize(
        "settings",
        [
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": ["embed_tokens"]},
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["embed_tokens", "q_proj"]},
            {"target_modules": ["lm_head", "q_proj"]},
            {"target_modules": ["embed_tokens", "lm_head"]},
        ],
        ids=str,
    )
    def test_a_tie_that_training_broke_is_refused(self, settings):
        with pytest.raises(
            ValueError, match=r"embed_tokens\.weight and lm_head\.weight are tied.*ensure_weight_tying"
        ):
            find_adapters(lora(llama(tied=True), **settings))

    def test_the_same_is_allowed_without_a_tie(self):
        assert len(find_adapters(lora(llama(), modules_to_save=["embed_tokens", "lm_head"])).adapted) == 6

    def test_adapters_tied_by_peft_merge_once(self):
        model = lora(llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
        found = find_adapters(model)
        embedding, head = found.weights["model.embed_tokens.weight"], found.weights["lm_head.weight"]
        assert torch.equal(embedding, head)
        tokens = torch.arange(20)[None]
        expected = model.eval()(tokens).logits
        plain = model.unload()
        plain.load_state_dict({name: tensor.clone() for name, tensor in found.weights.items()})
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)

    def test_tied_adapters_that_fell_apart_are_refused(self):
        model = lora(llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
        factor = model.base_model.model.lm_head.lora_A["default"]
        factor.weight = nn.Parameter(factor.weight.detach().clone())  # what a move to another device does
        with pytest.raises(ValueError, match="loses its tie when the model moves"):
            find_adapters(model)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            (lambda: peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"]), "ADALORA"),
            (lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]), "LOHA"),
            (lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]), "LOKR"),
            (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
            (lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]), "OFT"),
            (lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]), "VERA"),
            (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
            (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_other_kinds_by_name(self, config, kind):
        with pytest.raises(ValueError, match=rf"of kind {kind}, expected LORA.*merge_and_unload"):
            find_adapters(Module(get_peft_model(llama(), config())))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "TrainableTokensWrapper"),
            ({"alora_invocation_tokens": [1]}, "q_proj is adapted by ALoraLinearVariant"),
            ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ],
        ids=["trainable tokens", "activated LoRA", "layer replication"],
    )
    def test_variants_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            find_adapters(get_peft_model(llama(), LoraConfig(**{"target_modules": ["q_proj"], **settings})))

    def test_convolutions_by_name(self):
        model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(
            ValueError, match=r"0 is adapted by peft\.tuners\.lora\.layer\.Conv2d, expected LoRA on"
        ):
            find_adapters(model)

    def test_several_adapters_with_dora(self):
        model = lora(llama(), use_dora=True)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"several active adapters.*set_adapter"):
            find_adapters(model)

    def test_quantized_base(self):
        model = lora(llama())
        layer = dict(lora_layers(model))[Q].base_layer
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(ValueError, match=rf"{Q} is quantized .*float8_e4m3fn.*dequantize"):
            find_adapters(model)

    def test_layer_of_a_quantized_base(self, monkeypatch):
        model = lora(llama())
        cls = type(dict(lora_layers(model))[Q])
        quantized = type("Linear4bit", (cls,), {"__module__": "peft.tuners.lora.bnb"})
        dict(lora_layers(model))[Q].__class__ = quantized
        with pytest.raises(
            ValueError, match=r"q_proj is adapted by peft\.tuners\.lora\.bnb\.Linear4bit.*unquantized"
        ):
            find_adapters(model)

    def test_merged_in_place(self):
        model = lora(llama())
        found = find_adapters(model)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged into model\.layers\.0.*unmerge_adapter"):
            find_adapters(model)
        with pytest.raises(ValueError, match="unmerge_adapter"):
            found.weights[Q]

    def test_disabled(self):
        model = lora(llama())
        with model.disable_adapter(), pytest.raises(ValueError, match=r"are disabled.*enable_adapters"):
            find_adapters(model)
        assert find_adapters(model) is not None

    def test_none_active(self):
        needs_add_adapter()
        model = llama()
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="first")
        for _, layer in lora_layers(model):
            layer._active_adapter = []
        with pytest.raises(ValueError, match=r"none of its adapters \(first\) is active.*set_adapter"):
            find_adapters(model)

    def test_meta_parameters(self):
        model = lora(llama())
        layer = dict(lora_layers(model))[Q].base_layer
        layer.weight = nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
        with pytest.raises(ValueError, match=rf"{Q} .*meta device.*offloading"):
            find_adapters(model)

    def test_two_adapted_models(self):
        module = Module(lora(llama()))
        module.judge = lora(llama())
        with pytest.raises(ValueError, match=r"Expected one model with adapters.*judge"):
            find_adapters(module)


class TestAdapterFolder:
    def test_equals_the_live_merge_exactly(self, adapted, tmp_path):
        found = find_adapters(adapted)
        live = {name: tensor.clone() for name, tensor in found.weights.items()}
        save_adapter(Module(adapted), tmp_path)
        folder = read_adapter(tmp_path)
        assert set(folder.names) == set(found.adapted)
        assert folder.unused(found.base) == ()
        for name, weight in found.base.items():
            merged = folder.merged(name, weight)
            assert (merged is not None) == (name in found.adapted)
            assert torch.equal(weight if merged is None else merged, live[name])

    def test_what_peft_saves_is_read_the_same(self, adapted, tmp_path):
        found = find_adapters(adapted)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        folder = read_adapter(tmp_path)
        for name in found.adapted:
            assert torch.equal(folder.merged(name, found.base[name]), found.weights[name])

    def test_saved_adapter_loads_in_peft(self, adapted, tmp_path):
        tokens = torch.arange(20)[None]
        expected = adapted.eval()(tokens).logits
        assert save_adapter(adapted, tmp_path / "adapter") == (tmp_path / "adapter",)
        assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        base = {"GPT2": gpt2, "Qwen2": qwen2}.get(type(adapted.base_model.model).__name__[:5].rstrip("LF"))
        tied = adapted.base_model.model.config.tie_word_embeddings
        plain = base() if base else llama(tied=tied)
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-6)

    def test_saved_injected_adapter_loads_in_peft(self, tmp_path):
        needs_add_adapter()
        model = llama()
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        train(model).eval()
        config = copy.deepcopy(model.peft_config["default"].to_dict())
        save_adapter(Module(model), tmp_path)
        assert model.peft_config["default"].to_dict() == config
        loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
        found = find_adapters(model)
        assert torch.equal(read_adapter(tmp_path).merged(Q, found.base[Q]), found.weights[Q])

    def test_several_adapters_get_a_folder_each(self, tmp_path):
        model = lora(llama())
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "second"])
        assert save_adapter(model, tmp_path) == (tmp_path / "default", tmp_path / "second")
        assert read_adapter(tmp_path / "second").names == (Q, Q.replace("layers.0", "layers.1"))

    def test_moved_base_keeps_its_adapter_without_moving_again(self, tmp_path):
        model = lora(llama(), init_lora_weights="pissa")
        weights = {name: tensor.clone() for name, tensor in find_adapters(model).weights.items()}
        save_adapter(model, tmp_path)
        assert model.peft_config["default"].init_lora_weights == "pissa"
        moved = model.unload()
        merged = read_adapter(tmp_path).merged(Q, moved.state_dict()[Q])
        assert torch.equal(merged, weights[Q])
        loaded = PeftModel.from_pretrained(moved, str(tmp_path))
        assert torch.equal(find_adapters(loaded).weights[Q], weights[Q])

    def test_scaling_set_by_hand_cannot_be_saved(self, tmp_path):
        model = lora(llama())
        dict(lora_layers(model))[Q].scale_layer(0.5)
        with pytest.raises(ValueError, match="scaling set by hand"):
            save_adapter(model, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_reports_what_the_checkpoint_lacks(self, tmp_path):
        save_adapter(lora(llama(), modules_to_save=["lm_head"]), tmp_path)
        folder = read_adapter(tmp_path)
        assert folder.unused(n for n in llama().state_dict() if n != "lm_head.weight") == ("lm_head.weight",)
        assert set(folder.unused([])) == set(folder.names)

    def test_says_which_ties_it_breaks(self, tmp_path):
        tie = [("model.embed_tokens.weight", "lm_head.weight")]
        save_adapter(lora(llama(), target_modules=["embed_tokens"]), tmp_path / "embedding")
        assert read_adapter(tmp_path / "embedding").unties(tie) == tie[0][:1]
        save_adapter(lora(llama(), modules_to_save=["lm_head"]), tmp_path / "head")
        assert read_adapter(tmp_path / "head").unties(tie) == tie[0][1:]
        for number, settings in enumerate(
            [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
        ):
            save_adapter(lora(llama(tied=True), ensure_weight_tying=True, **settings), tmp_path / str(number))
            folder = read_adapter(tmp_path / str(number))
            assert folder.unties(tie) == ()
            assert folder.unused(n for n in llama().state_dict() if n != "lm_head.weight") == ()
        save_adapter(lora(llama()), tmp_path / "neither")
        assert read_adapter(tmp_path / "neither").unties(tie) == ()

    def change(self, folder, **fields):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "LOHA"}, "kind 'LOHA', expected 'LORA'"),
            ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
            ({"target_parameters": ["experts.up"]}, "has target_parameters"),
            ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
            ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
            ({"use_dora": True}, "says use_dora=True, but .* no magnitude"),
            ({"r": 5}, "the rank 5 .* has rank 4"),
            ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_by_name(self, tmp_path, fields, message):
        save_adapter(lora(llama()), tmp_path)
        self.change(tmp_path, **fields)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(tmp_path)

    def test_every_other_kind_of_peft_is_refused(self, tmp_path):
        model = get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="kind 'LOHA'"):
            read_adapter(tmp_path)

    def test_never_opens_a_pickle(self, tmp_path):
        save_adapter(lora(llama()), tmp_path)
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="a pickle, which is never opened"):
            read_adapter(tmp_path)
        with pytest.raises(CheckpointError, match="is not an adapter folder"):
            read_adapter(tmp_path / "nowhere")

    def test_another_model_is_refused(self, tmp_path):
        save_adapter(lora(llama(), modules_to_save=["lm_head"]), tmp_path)
        folder = read_adapter(tmp_path)
        with pytest.raises(CheckpointError, match=rf"cannot be merged into {Q}.*trained on this model"):
            folder.merged(Q, torch.zeros(32, 64))
        with pytest.raises(
            CheckpointError, match=r"replaces lm_head\.weight by a tensor of shape \(96, 64\)"
        ):
            folder.merged("lm_head.weight", torch.zeros(100, 64))


class TestMergeLora:
    def random(self, M=40, N=24, R=3):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(*shape, generator=generator) for shape in ((M, N), (R, N), (M, R), (M,)))

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("dora", [False, True])
    def test_bands_do_not_show(self, monkeypatch, transposed, dora):
        weight, A, B, magnitude = self.random()
        factors = [LoraFactors(A_RN=A, B_MR=B, scaling=0.7, magnitude=magnitude.abs() if dora else None)]
        weight = weight.T.contiguous() if transposed else weight
        whole = merge_lora(weight, factors, transposed=transposed)
        monkeypatch.setattr("daq_lightning.numerics.lora._BAND", 60)
        torch.testing.assert_close(
            merge_lora(weight, factors, transposed=transposed), whole, rtol=2**-23, atol=0
        )
        if not dora:
            assert torch.equal(merge_lora(weight, factors, transposed=transposed), whole)

    def test_stored_transposed_gives_the_transpose(self):
        weight, A, B, magnitude = self.random()
        for size in (None, magnitude.abs()):
            factors = [LoraFactors(A_RN=A, B_MR=B, scaling=0.7, magnitude=size)]
            torch.testing.assert_close(
                merge_lora(weight.T, factors, transposed=True).T,
                merge_lora(weight, factors),
                rtol=2**-22,
                atol=0,
            )

    def test_dora_rows_have_the_length_of_the_magnitude(self):
        weight, A, B, magnitude = self.random()
        merged = merge_lora(weight, [LoraFactors(A_RN=A, B_MR=B, scaling=2.0, magnitude=magnitude.abs())])
        torch.testing.assert_close(merged.norm(dim=1), magnitude.abs())

    def test_no_adapters_or_a_zero_one_give_the_weight(self):
        weight, A, B, _ = self.random()
        weight = weight.bfloat16()
        assert torch.equal(merge_lora(weight, []), weight.float())
        assert torch.equal(merge_lora(weight, [LoraFactors(A_RN=A, B_MR=0 * B, scaling=3.0)]), weight.float())
        assert merge_lora(torch.empty(0, 24), [LoraFactors(A_RN=A, B_MR=B[:0], scaling=1.0)]).shape == (0, 24)

    def test_input_is_left_alone(self):
        weight, A, B, _ = self.random()
        for tensor in (weight.double(), weight):
            before = tensor.clone()
            assert (
                merge_lora(tensor, [LoraFactors(A_RN=A, B_MR=B, scaling=1.0)]).data_ptr() != tensor.data_ptr()
            )
            assert torch.equal(tensor, before)
            merge_lora_bias(tensor[0], [(B[:24, 0], 1.0)])
            assert torch.equal(tensor, before)

    def test_factors_that_do_not_fit(self):
        weight, A, B, magnitude = self.random()
        good = LoraFactors(A_RN=A, B_MR=B, scaling=1.0, magnitude=magnitude)
        for wrong in (
            LoraFactors(A_RN=A[:2], B_MR=B, scaling=1.0),
            LoraFactors(A_RN=A, B_MR=B[:5], scaling=1.0),
            LoraFactors(A_RN=A, B_MR=B, scaling=1.0, magnitude=magnitude[:5]),
        ):
            with pytest.raises(ValueError, match="does not fit the weight"):
                merge_lora(weight, [wrong])
        with pytest.raises(ValueError, match="stored as"):
            merge_lora(weight, [good], transposed=True)
        with pytest.raises(ValueError, match="stands alone, got 2"):
            merge_lora(weight, [good, LoraFactors(A_RN=A, B_MR=B, scaling=1.0)])

    def test_experts_are_merged_one_by_one(self):
        E, M, N, R = 3, 5, 4, 2
        generator = torch.Generator().manual_seed(0)
        weight, A, B = (torch.randn(*s, generator=generator) for s in ((E, M, N), (E * R, N), (M, R * E)))
        merged = merge_lora_experts(weight, [LoraFactors(A_RN=A, B_MR=B, scaling=0.5)])
        expected = weight + 0.5 * torch.einsum("mre,ern->emn", B.reshape(M, R, E), A.reshape(E, R, N))
        torch.testing.assert_close(merged, expected)


def test_a_clean_run_warns_of_nothing():
    model = lora(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_adapters(model)
        [found.weights[name] for name in found.weights]
