"""transformers' own Trainer, and all that derive from it (TRL's): an export when training ends.

    trainer = Trainer(..., callbacks=[ExportQuantized(base="base/", out="fp8/", scheme="FP8_BLOCK")])

The class is the recipe; the rest trains a model of a folder on a text, to show it.

    python recipes/transformers_trainer.py base/ text.txt fp8/ [--lora] [--steps 100]
"""

import argparse
from pathlib import Path
from typing import Any

import peft
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from daq_lightning import export_model


class ExportQuantized(TrainerCallback):
    """Exports what was trained. base="auto" takes the frozen weights under PEFT adapters."""

    def __init__(self, base: str, out: str, **settings: Any) -> None:
        self.base, self.out, self.settings = base, out, settings

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Of several processes all come here, and share the work."""
        tokenizer = more["processing_class"]
        self.report = export_model(more["model"], self.base, self.out, tokenizer=tokenizer, **self.settings)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="folder of a causal language model with its tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("out")
    parser.add_argument("--lora", action="store_true", help="train rank-8 adapters on all linear layers")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype="float32")
    if args.lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    tokenizer: Any = AutoTokenizer.from_pretrained(args.base)
    ids = tokenizer(args.text.read_text("utf-8"))["input_ids"]
    pieces = [ids[at : at + args.length] for at in range(0, len(ids) - args.length + 1, args.length)]
    export = ExportQuantized("auto" if args.lora else args.base, args.out)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            f"{args.out}-trainer",
            max_steps=args.steps,
            learning_rate=args.lr,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces],  # type: ignore[arg-type]
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[export],
    )
    trainer.train()
    print(export.report.summary())


if __name__ == "__main__":
    main()
