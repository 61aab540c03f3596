"""Pieces of a model in training are those of its whole weights, now and after every step."""

import lightning.pytorch as L
import pytest
import tiny_models
import torch

from daq_lightning.model.live import LiveModel
from daq_lightning.model.pieces import LivePieces
from daq_lightning.numerics.tiling import Box

MODELS = [
    tiny_models.llama, tiny_models.qwen3_moe, tiny_models.mixtral, tiny_models.phi3, tiny_models.gpt2,
    tiny_models.llava, tiny_models.qwen2_vl, tiny_models.gemma3,
]  # fmt: skip


class Module(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("factory", MODELS, ids=lambda factory: factory.__name__)
def test_a_piece_is_that_of_the_whole_weight_at_every_step(factory):
    module = Module(factory())
    model = LiveModel(module)
    live = LivePieces(model)
    names = [spec.name for spec in model.specs if len(spec.shape) == 2]
    assert live.trained(names) == names
    for _ in range(2):
        whole = LiveModel(module).weights
        for name in names:
            M, N = whole[name].shape
            for box in (Box(0, M, 0, N), Box(1, M // 2, N // 2, N)):
                piece = whole[name][box.top : box.bottom, box.left : box.right]
                assert torch.equal(live.read(name, box), piece), name
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)


def test_a_piece_of_a_plain_weight_is_a_view_of_it():
    module = Module(tiny_models.llama())
    name = "model.layers.1.mlp.up_proj.weight"
    piece = LivePieces(LiveModel(module)).read(name, Box(128, 256, 0, 128))
    assert piece.untyped_storage().data_ptr() == module.model.get_parameter(name).untyped_storage().data_ptr()
    assert not piece.requires_grad


def test_weights_that_are_frozen_are_not_among_the_trained():
    module = Module(tiny_models.llama())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("o_proj" in name)
    model = LiveModel(module)
    assert LivePieces(model).trained(spec.name for spec in model.specs) == [
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)
    ]
