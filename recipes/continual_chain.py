"""Continual learning: three skills, one after another, each trained from the FP8 model that the stage before
deployed.

    root -> stage 1: Title Case -> stage 2: UPPER CASE -> stage 3: under_scores      (a first byte asks for
    the style)

Each stage starts from the weights that are served, so what an export rounds away is gone, and replays earlier
skills. Three chains: no FP8, plain (absmax) scales, scales searched for the update (DAQ). Six minutes on one
core; seed 0: of Title Case as stage 1 taught it without FP8, plain FP8 deploys 68 % and DAQ 98 %. By stage 3
replay has brought plain FP8 back to 99 %, DAQ to 117 % as no FP8; of under_scores, the last skill, plain FP8
then has 63 % and DAQ 99 %.

    python recipes/continual_chain.py [--out outputs/chain] [--seed 0] [--fast]
"""

import argparse
import logging
import random
import re
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from daq_lightning import Chain, DeltaAwareQuantization, ScaleSearch, export_checkpoint, load_checkpoint

CONTEXT, BATCH, LR = (
    128,
    8,
    3e-5,
)  # bytes of a training example, examples of a step, learning rate of the stages
SKILLS = {
    "Title Case": lambda text: re.sub(r"\b[a-z]", lambda match: match[0].upper(), text),
    "UPPER CASE": str.upper,
    "under_scores": lambda text: text.replace(" ", "_"),
}
CONFIG = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=256, initializer_range=0.04)  # fmt: skip
START = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {line}", flush=True)


def standard_library_text() -> tuple[str, str]:
    """English to train on, and some to test on: the docstrings of the Python that runs this file."""
    others = {"test", "tests", "site-packages", "dist-packages"}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    sources = [file.read_text("utf-8", errors="ignore") for file in files if others.isdisjoint(file.parts)]
    found = [
        text for source in sources for text in re.findall(r':\n\s+r?"""(.{60,4000}?)"""', source, re.DOTALL)
    ]
    texts = [re.sub(r"\n\s+", "\n", text) for text in found if text.isascii()]
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts[400:]), "\n\n".join(texts[:400])


def examples(text: str, count: int, seed: int, tag: int) -> Tensor:
    """Random cut-outs of a text behind the byte that asks for a style, as tokens (count, CONTEXT + 1)."""
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((count, 1), tag), tokens[starts + torch.arange(CONTEXT)]], dim=1)


def examples_of_stage(text: str, stage: int, count: int, seed: int) -> Tensor:
    """Half of them of the new skill, the rest plain and of earlier skills, so that training itself forgets
    little."""
    styles = [str, *SKILLS.values()][: stage + 1]
    counts = [count // 2 // stage] * stage + [count // 2]
    return torch.cat([examples(styles[tag](text), counts[tag], seed + tag, tag) for tag in range(stage + 1)])


class LanguageModel(L.LightningModule):
    """Next-byte prediction from the dequantized weights of a folder or from scratch."""

    def __init__(self, lr: float, folder: Path | None = None) -> None:
        super().__init__()
        self.model, self.lr = LlamaForCausalLM(CONFIG), lr
        if folder:
            self.model.load_state_dict(
                {name: tensor.float() for name, tensor in load_checkpoint(folder).items()}
            )

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(
            self.model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        if batch_idx % 50 == 0:
            say(f"  step {batch_idx}/{self.trainer.max_steps}, loss {loss:.3f} nats per byte")
        return loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, int(self.trainer.max_steps), pct_start=0.1
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(module: LanguageModel, data: Tensor, callback: L.Callback | None = None) -> None:
    trainer = L.Trainer(
        max_steps=len(data) // BATCH,
        gradient_clip_val=1.0,
        callbacks=callback,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=BATCH, shuffle=True))


@torch.no_grad()
def losses(folder: Path, held_out: list[Tensor]) -> list[float]:
    return [float(LanguageModel(0, folder).eval().loss(batch)) for batch in held_out]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("outputs/chain"), help="folder of all checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps only: checks that everything runs")
    args = parser.parse_args()
    root_steps, steps, tests = (3, 3, 4) if args.fast else (600, 200, 96)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    seen, unseen = standard_library_text()
    say(f"Root: {root_steps} steps on {len(seen) / 1e6:.1f} MB of English, deployed in FP8")
    L.seed_everything(args.seed, verbose=False)
    module, unrounded, root = LanguageModel(4e-3), args.out / "root-bf16", args.out / "root"
    train(module, examples(seen, root_steps * BATCH, args.seed, tag=0))
    module.model.bfloat16().save_pretrained(unrounded)
    export_checkpoint(unrounded, unrounded, root, scheme="FP8_BLOCK", search=ScaleSearch.absmax())
    held_out = [examples(style(unseen), tests, 1, tag) for tag, style in enumerate(SKILLS.values(), 1)]
    found, folder = {"root": losses(root, held_out)}, root
    for chain, search in {"no FP8": None, "plain FP8": ScaleSearch.absmax(), "DAQ": ScaleSearch()}.items():
        folder = root
        for stage, skill in enumerate(SKILLS, 1):
            say(f"{chain}, stage {stage}: {skill}")
            L.seed_everything(args.seed + stage, verbose=False)
            module, out = LanguageModel(LR, folder), args.out / chain.replace(" ", "-") / f"stage-{stage}"
            data = examples_of_stage(seen, stage, steps * BATCH, args.seed + 10 * stage)
            link: Any = {"parent": str(folder), "chain_from": "deployed"} if stage > 1 else {}
            if search is None:
                train(module, data)
                module.model.bfloat16().save_pretrained(folder := out)
            else:  # a snapshot at the start is the base; it is checked against what the parent deployed
                callback = DeltaAwareQuantization(str(out), scheme="FP8_BLOCK", search=search, **link)
                train(module, data, callback)
                folder = callback.exports[-1]
            found[f"{chain}, stage {stage}"] = losses(folder, held_out)
    before, taught = found["root"][0], found["no FP8, stage 1"][0]
    print("\n| loss of            |", " | ".join(SKILLS), "| Title Case, kept |\n|", "--- | " * 5)
    for name, values in found.items():
        kept = f"{(before - values[0]) / (before - taught):.1%} |"
        print(f"| {name:18} |", *(f"{value:.4f} |" for value in values), kept)
    print(
        f"\n{Chain.open(folder).table()}\naltered or foreign files: {Chain.open(folder).verify() or 'none'}"
    )


if __name__ == "__main__":
    main()
