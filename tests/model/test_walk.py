"""What a walk layer by layer sums is what autograd gives on the whole model; nothing else is in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from daq_lightning import CheckpointError, load_checkpoint
from daq_lightning.checkpoint.spill import Spill
from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.model.fusion import shared_input
from daq_lightning.model.layers import linear_layers
from daq_lightning.model.observer import Layer
from daq_lightning.model.own_text import sample_text
from daq_lightning.model.stack import NotAStackError
from daq_lightning.model.streamed import StreamedModel
from daq_lightning.model.walk import Walk
from daq_lightning.model.whole import WholeModel, load_whole

SIZES = (40, 33, 20, 64)  # of windows: filled up, and in one batch


FAMILIES = {
    "llama": tiny_models.llama,
    "qwen3": tiny_models.qwen3,
    "tied": lambda: tiny_models.qwen2(tie_word_embeddings=True),
    "two masks": lambda: tiny_models.gemma3(sliding_window=8),
    "experts": lambda: tiny_models.qwen3_moe(num_experts=4, num_experts_per_tok=2),
}


def windows(*sizes: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny_models.VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def saved(folder: Path, factory: Callable[[], nn.Module]) -> Path:
    return tiny_models.make_pair(folder, factory, dtype=torch.float32)[1]


def layers_of(model: StreamedModel) -> list[Layer]:
    names = [name for name in model.keys if name.endswith("proj.weight")]
    return [
        Layer(name=name, group=shared_input(name), shape=tuple(users[0].weight.shape), modules=users)
        for name, users in linear_layers(model, names).items()
    ]


def oracle(path: Path, names: dict[str, str]) -> tuple[float, dict[str, tuple[np.ndarray, np.ndarray, int]]]:
    """The loss, and x^T x and y^T y in float64, of plain transformers and autograd, a window at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name].append((args[0], output))

        return keep

    for name, key in names.items():
        model.get_submodule(key.removesuffix(".weight")).register_forward_hook(hook(name))
    total = 0.0
    for window in windows(*SIZES):
        logits = model(input_ids=torch.tensor([window])).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
        loss.backward()
        total += loss.item()
    sums = {}
    for name, calls in seen.items():
        pairs = [(x[0, :-1].detach().double().numpy(), y.grad[0].double().numpy()) for x, y in calls]
        sums[name] = (sum(x.T @ x for x, _ in pairs), sum(y.T @ y for _, y in pairs), len(pairs))
    return total / (sum(SIZES) - len(SIZES)), sums


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_and_loss_are_those_of_autograd_on_the_whole_model(tmp_path, family):
    path = saved(tmp_path, FAMILIES[family])
    with Spill() as spill:
        model = StreamedModel(load_checkpoint(path), "cpu")
        walk = Walk(model, layers_of(model), windows(*SIZES), spill)
        loss = walk.go()
        found = [AllCollected([Collected.of(walk.sums(part))], "text") for part in range(model.depth)]
    names = {name: model.keys[name] for part in found for name in part}
    assert len(names) == (8 if family == "experts" else 14)
    expected_loss, expected = oracle(path, names)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for part in found:
        for name in part:
            inputs, outputs, calls = expected[name]
            assert calls == len(SIZES)
            scale = np.abs(inputs).max(), np.abs(outputs).max()
            np.testing.assert_allclose(part[name].inputs.numpy(), inputs, rtol=0, atol=2e-6 * scale[0])
            np.testing.assert_allclose(part[name].outputs.numpy(), outputs, rtol=0, atol=2e-5 * scale[1])
            own = len(SIZES) if "q_proj" in name else 0  # which has no choice at the first token
            assert part[name].tokens == sum(SIZES) - len(SIZES) - own


def test_a_model_that_is_whole_gives_the_same_sums(tmp_path):
    path = saved(tmp_path, tiny_models.llama)
    files = load_checkpoint(path)
    model = StreamedModel(files, "cpu")
    with Spill() as spill:
        walk = Walk(model, layers_of(model), windows(*SIZES), spill)
        loss = walk.go()
        expected = [walk.sums(part) for part in range(model.depth)]
    whole = load_whole(files, "cpu", "")
    layers = [
        replace(layer, modules=(whole.get_submodule(layer.name.removesuffix(".weight")),))
        for layer in layers_of(model)
    ]
    observed = WholeModel(whole, layers, windows(*SIZES), "whole")
    assert observed.go() == pytest.approx(loss, rel=1e-6)
    [sums] = [observed.sums(part) for part in range(len(observed.parts))]
    for part in expected:
        for name, one in (part.outputs | part.inputs).items():
            other = (sums.outputs | sums.inputs)[name]
            size = float(one.total.abs().max())
            assert torch.allclose(other.total, one.total, rtol=0, atol=1e-5 * size)


def test_layers_called_by_place_and_tensors_that_are_tied_are_walked(tmp_path):
    path = saved(tmp_path, tiny_models.gpt2)
    with Spill() as spill:
        loss = Walk(StreamedModel(load_checkpoint(path), "cpu"), [], windows(*SIZES), spill).go()
    assert loss == pytest.approx(oracle(path, {})[0], rel=1e-6)


def test_what_is_no_stack_or_not_causal_is_known_by_trying(tmp_path, monkeypatch):
    path = saved(tmp_path, tiny_models.llama)
    forward = transformers.LlamaModel.forward

    def walk() -> float:
        with Spill() as spill:
            return Walk(StreamedModel(load_checkpoint(path), "cpu"), [], windows(20), spill).go()

    def with_more(self, *args, **kwargs):
        first, *_ = self.layers
        handle = first.register_forward_hook(lambda module, inputs, output: output + 1)
        try:
            return forward(self, *args, **kwargs)
        finally:
            handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "forward", with_more)
        with pytest.raises(NotAStackError, match="layer 1 is not given what"):
            walk()
    config = transformers.AutoConfig.from_pretrained(path)
    config.is_causal = False
    config.save_pretrained(path)
    with pytest.raises(CheckpointError, match="see those after them"):
        walk()


def test_a_model_that_writes_nan_or_is_no_language_model_is_refused(tmp_path):
    path = saved(tmp_path, tiny_models.llama)
    weights = dict(load_checkpoint(path).items())
    weights["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(weights, path / "model.safetensors")
    with Spill() as spill, pytest.raises(ValueError, match="behind layer 1 are NaN or Inf"):
        Walk(StreamedModel(load_checkpoint(path), "cpu"), [], windows(20), spill).go()
    with pytest.raises(ValueError, match="it can write no text"):
        sample_text(load_whole(load_checkpoint(path), "cpu", ""), count=2, length=4)
    transformers.BertModel(
        transformers.BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=64)
    ).save_pretrained(tmp_path / "bert")  # fmt: skip
    with pytest.raises(CheckpointError, match="BertModel has no head"):
        StreamedModel(load_checkpoint(tmp_path / "bert"), "cpu")


def test_a_model_too_large_for_memory_is_not_loaded_whole(tmp_path, monkeypatch):
    files = load_checkpoint(saved(tmp_path, tiny_models.llama))
    monkeypatch.setattr("daq_lightning.model.whole._memory", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"To write a text, .* in memory whole: .* GB in float32"):
        load_whole(files, "cpu", "To write a text")


def test_a_text_of_its_own_follows_the_models_probabilities_and_is_the_same_each_time(tmp_path):
    model = tiny_models.llama().eval()
    state = torch.get_rng_state()
    one, two = (sample_text(model, count=600, length=3) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_text(model, count=600, length=3, seed=1) != one
    assert {row[0] for row in one} == {tiny_models.TEXT["bos_token_id"]}
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # to sharp distributions, without a cache as the oracle
        rows = torch.tensor(sample_text(model, count=600, length=3))
        expected = model(input_ids=rows[:, :1]).logits[0, 0].softmax(-1).double().numpy()
    found = np.bincount(rows[:, 1].numpy(), minlength=64) / 600
    assert np.abs(found - expected).sum() / 2 < 0.15
    model.config.bos_token_id = None
    assert len({row[0] for row in sample_text(model, count=600, length=2)}) > 40


def test_a_text_is_written_from_the_cache_token_by_token():
    model, seen = tiny_models.llama().eval(), []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text = sample_text(model, count=2, length=6)
    hook.remove()
    assert seen == [1, 1, 1, 1, 1]
    assert {len(row) for row in text} == {6}


MEMORY = """
import gc, sys
import torch
import transformers.models.llama.modeling_llama
from daq_lightning import load_checkpoint
from daq_lightning.checkpoint.spill import Spill
from daq_lightning.model.layers import linear_layers
from daq_lightning.model.observer import Layer
from daq_lightning.model.streamed import StreamedModel
from daq_lightning.model.walk import Walk
torch.set_num_threads(1)

def memory(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) * 1024

for layers in (2, 2, 8):  # the first warms up
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    with Spill() as spill:
        model = StreamedModel(load_checkpoint(f"{sys.argv[1]}/{layers}/post"), "cpu")
        names = [name for name in model.keys if name.endswith("proj.weight")]
        observed = [Layer(name=name, group=name, shape=(), modules=users)
                    for name, users in linear_layers(model, names).items()]
        walk = Walk(model, observed, [list(range(3, 63)) for _ in range(8)], spill)
        walk.go()
        for part in range(model.depth):
            walk.sums(part)
    print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    size = {}
    for count in (2, 8):
        shape = {"num_hidden_layers": count, "hidden_size": 512, "intermediate_size": 1024}
        _, post = tiny_models.make_pair(tmp_path / str(count), tiny_models.llama, **shape)
        size[count] = 2 * (post / "model.safetensors").stat().st_size  # of float32
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    peak = [int(line) for line in result.stdout.splitlines()[-2:]]
    assert size[8] - size[2] > 40e6
    assert peak[1] - peak[0] < (size[8] - size[2]) / 8
