"""Curvature from the gradients of weights: those of whole steps, before clipping, as NumPy sums them."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, fit
from test_curvature import adapted, quantization, sources

from daq_lightning.export.collected import AllCollected

QKV, GATED = tuple(f"self_attn.{leaf}_proj" for leaf in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
SHARING = dict.fromkeys(QKV, QKV) | dict.fromkeys(GATED, GATED)
SHARING |= {name: (name,) for name in ("self_attn.o_proj", "mlp.down_proj")}
"""Layer -> the layers that share its input."""


class Records(L.Callback):
    """The gradients of every step, and what the callback has of them in the end."""

    def __init__(self, export) -> None:
        self.export, self.steps, self.found = export, [], AllCollected([], "")

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop._should_accumulate():
            return
        inside = pl_module.model.model.layers[0]
        gradients = {name: inside.get_submodule(name).weight.grad.double().numpy().copy() for name in SHARING}
        self.steps.append(gradients)

    def on_train_end(self, trainer, pl_module):
        owners = dict.fromkeys((f"model.layers.0.{name}.weight" for name in SHARING), 0)
        self.found = self.export._run.collector.curvature(owners)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2, "max_steps": 2}]
)
def test_sums_are_those_of_numpy(tmp_path: Path, changes: dict):
    callback = quantization(tmp_path, curvature="gradients")
    records = Records(callback)
    with_it = fit(tmp_path, records, callback, **changes)
    assert len(records.steps) == changes.get("max_steps", 4)
    for name, sharing in SHARING.items():
        one = records.found[f"model.layers.0.{name}.weight"]
        inputs = sum(step[other].T @ step[other] for step in records.steps for other in sharing)
        outputs = sum(step[name] @ step[name].T for step in records.steps)
        np.testing.assert_allclose(one.inputs.numpy(), inputs, rtol=1e-4, atol=1e-6 * inputs.max())
        np.testing.assert_allclose(one.outputs.numpy(), outputs, rtol=1e-4, atol=1e-6 * outputs.max())
        assert one.tokens == len(records.steps)
    assert sources(callback.report) == {"gradients and update"}
    without = fit(tmp_path, **changes)
    for one, two in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_compiled_model_has_gradients(tmp_path):
    module = Tuning()
    module.model.model.layers[0].compile(backend="eager")
    callback = quantization(tmp_path, curvature="gradients")
    fit(tmp_path, callback, module=module)
    assert sources(callback.report) == {"gradients and update"}


def test_adapters_have_none_of_the_weights(tmp_path):
    module = adapted()
    with pytest.raises(MisconfigurationException, match="use curvature='activations'"):
        fit(tmp_path, quantization(tmp_path, curvature="gradients"), module=module)
    assert module.steps == 0
