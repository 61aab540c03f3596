"""A loop of one's own with Lightning Fabric, exported by `export_model`.

python recipes/fabric_loop.py base/ text.txt fp8/ [--steps 100] [--devices 1]
torchrun --nproc-per-node 2 recipes/fabric_loop.py base/ text.txt fp8/ --devices 2      (DDP)
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from daq_lightning import export_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="folder of a causal language model with its tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0)
    loaded: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(args.base)
    ids = torch.tensor(tokenizer(args.text.read_text("utf-8"))["input_ids"])
    pieces: Any = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    model, optimizer = fabric.setup(loaded, torch.optim.AdamW(loaded.parameters(), lr=args.lr))
    loader = fabric.setup_dataloaders(DataLoader(pieces, batch_size=8, shuffle=True))
    step = 0
    while step < args.steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == args.steps:
                break
    report = export_model(model, args.base, args.out, tokenizer=tokenizer)  # all ranks call it
    fabric.print(report.summary())


if __name__ == "__main__":
    main()
