"""A tiny model in training, for the tests of the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0, hidden: int = 128, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(fields | changes)))


class Tuning(L.LightningModule):
    """Fine-tunes a causal language model with dropout-like noise, so that the random state matters."""

    def __init__(self, model: nn.Module | None = None, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model = tiny_llama() if model is None else model
        self.learning_rate = learning_rate
        self.steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        keep = torch.rand(batch.shape) > 0.1
        loss = self.model(input_ids=batch * keep, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)


def data(length: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(torch.randint(1, 32, (length, 8), generator=generator), batch_size=2)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: L.Callback, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | changes))


def fit(
    folder: Path, *callbacks: L.Callback, module: Tuning | None = None, ckpt: Any = None, **changes: Any
) -> Tuning:
    L.seed_everything(3, verbose=False)
    module = Tuning() if module is None else module
    trainer = make_trainer(folder, *callbacks, **changes)
    trainer.fit(module, data(), ckpt_path=ckpt)
    return module


def folder_bytes(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in skip
    }


def end_process_group() -> None:
    """Ends Lightning's group: a thread of gloo that still lets go of a message when Python ends aborts it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
