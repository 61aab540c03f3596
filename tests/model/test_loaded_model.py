"""A folder's model with its weights, held against transformers; and its two halves against the whole."""

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as shown

from daq_lightning import load_checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.halves import Halves


def load(path, dtype=torch.bfloat16):
    files = load_checkpoint(path)
    return FolderModel(path, len(files.raw)).load(files, dtype)


@pytest.mark.parametrize("factory", [tiny_models.qwen3_moe, tiny_models.gemma3, tiny_models.llava])
def test_the_tensors_are_those_that_transformers_loads(factory, tmp_path):
    path, _ = tiny_models.make_pair(tmp_path, factory)
    bars = shown.is_progress_bar_enabled()
    model = load(path)
    expected = type(model).from_pretrained(path, dtype=torch.bfloat16).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not model.training
    assert shown.is_progress_bar_enabled() == bars


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    path, _ = tiny_models.make_pair(tmp_path, tiny_models.llama)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 parameters are not in its files: model\.norm\.weight"):
        load(path)


@torch.no_grad()
def test_both_halves_are_the_whole_and_the_head_outlives_the_body(tmp_path):
    path, _ = tiny_models.make_pair(tmp_path, tiny_models.gemma3)
    model, tokens = load(path), torch.arange(6, 18).reshape(2, 6)
    expected = model(tokens).logits
    halves = Halves(model, "model")
    assert halves.try_on([5, 6, 7]) == tiny_models.VOCABULARY
    hidden_BTH = halves.hidden(tokens)
    assert torch.equal(model(tokens).logits, expected)  # the body is back in its place
    halves.drop_body()
    assert torch.equal(torch.stack([halves.logits(hidden_TH) for hidden_TH in hidden_BTH]), expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == tiny_models.VOCABULARY * 128
