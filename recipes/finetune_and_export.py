"""Fine-tune a small language model with Lightning, export it to FP8, and see what is left of the fine-tuning.

    base        bytes of English, from the comments and docstrings of this Python's standard library
    fine-tuned  The Same Text In Title Case, with updates that are small beside an FP8 step
    exports     plain absmax scales; scales searched for sign, cosine and hybrid; codes rounded along the
                curvature that the training itself has shown

Nothing is downloaded; two CPU cores need two to three minutes. By default the base is itself an FP8
checkpoint, as DeepSeek-V3 is: absmax scales then round most of the small updates straight back to the base.

    python recipes/finetune_and_export.py [--out outputs/demo] [--base-format fp8|bf16] [--seed 0] [--fast]

With a model of the Hub or of a folder instead, the same style is taught to that model, in float32, on a GPU
where there is one (16 bytes for each weight); plain scales and the default are compared.

    python recipes/finetune_and_export.py --model ORG/NAME [--steps 150] [--lr 1.5e-5] [--out outputs/demo]
"""

import argparse
import logging
import random
import re
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from daq_lightning import (
    CheckpointError,
    DeltaAwareQuantization,
    ExportReport,
    ScaleSearch,
    export_checkpoint,
    load_checkpoint,
)
from daq_lightning.model.hub import local_folder

CONTEXT, BATCH = 128, 8  # bytes of a training example, examples of a step
DOCSTRING_OR_COMMENT = re.compile(
    r':\n\s+r?"""(.+?)"""|((?:^[ \t]*# [^\n]*\n){2,})', re.DOTALL | re.MULTILINE
)
START = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {line}", flush=True)


def standard_library_text() -> list[str]:
    """Passages of prose, with a little code, from the Python that runs this file; always in the same shuffled
    order."""
    passages = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"test", "tests", "site-packages", "encodings", "lib2to3", "idlelib"}.isdisjoint(file.parts):
            for match in DOCSTRING_OR_COMMENT.finditer(file.read_text("utf-8", errors="ignore")):
                text = re.sub(r"^[ \t]*(# )?[ \t]*", "", match[1] or match[2], flags=re.MULTILINE).strip()
                letters = sum(c.isalpha() or c.isspace() for c in text)
                if text.isascii() and 60 < len(text) < 4000 and letters > 0.88 * len(text):
                    passages.append(text + "\n\n")
    random.Random(0).shuffle(passages)
    return passages


def in_title_case(text: str) -> str:
    """The style to learn: Every Word Begins With A Capital."""
    return re.sub(r"\b[a-z]", lambda match: match[0].upper(), text)


def windows(text: str, count: int, seed: int) -> Tensor:
    """Random cut-outs of a text, as byte tokens of shape (count, CONTEXT + 1)."""
    return cut_outs(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long(), count, seed)


def cut_outs(tokens: Tensor, count: int, seed: int) -> Tensor:
    """Random cut-outs of tokens, of shape (count, CONTEXT + 1)."""
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(CONTEXT + 1)]


def new_model() -> LlamaForCausalLM:
    """A Llama over the 256 byte values, with random weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=512, initializer_range=0.04, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def log_probs(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch[:, :-1]).logits.log_softmax(-1)


class LanguageModel(L.LightningModule):
    """Next-token prediction with AdamW, a short warm-up and a linear decay."""

    def __init__(self, model: nn.Module, lr: float, tokenizer: Any = None) -> None:
        super().__init__()
        self.model, self.lr, self.tokenizer = model, lr, tokenizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(log_probs(self.model, batch[0]).flatten(0, 1), batch[0][:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        if batch_idx % 25 == 0 and not sys.stdout.isatty():  # where Lightning's bar would be garbled
            say(
                f"  step {batch_idx}/{self.trainer.num_training_batches}, loss {loss.item():.3f} nats per "
                + ("byte" if self.tokenizer is None else "token")
            )
        return loss

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / (0.1 * steps), 1 - k / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    model: nn.Module, data: Tensor, lr: float, callbacks: list[L.Callback], tokenizer: Any = None
) -> None:
    bar = [TQDMProgressBar()] if sys.stdout.isatty() else []
    trainer = L.Trainer(
        accelerator="cpu" if tokenizer is None else "auto", devices=1, max_epochs=1,
        gradient_clip_val=1.0, callbacks=[*callbacks, *bar], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=bool(bar),
    )  # fmt: skip
    trainer.fit(LanguageModel(model, lr, tokenizer), DataLoader(TensorDataset(data), batch_size=BATCH))


class Result(NamedTuple):
    log_p: Tensor
    loss: float
    lines: list[str]


@torch.no_grad()
def evaluate(folder: Path, held_out: Tensor, new_bytes: int) -> Result:
    """Loss on unseen text and two generated lines of a checkpoint, loaded by plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    log_p = torch.cat([log_probs(model, batch) for batch in held_out.split(16)])
    loss = float(F.nll_loss(log_p.flatten(0, 1), held_out[:, 1:].flatten()))
    torch.manual_seed(0)
    prompt = torch.tensor([list(b"\n\nReturn the "), list(b"\n\nThis class ")])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_bytes,
    do_sample=True,
                         temperature=0.5, top_k=0, pad_token_id=0)  # fmt: skip
    return Result(
        log_p, loss, [" ".join(bytes(row).decode("ascii", "replace").split()) for row in out.tolist()]
    )


def print_table(results: dict[str, Result], reports: dict[str, ExportReport]) -> None:
    base, tuned = results["base"], results["BF16 fine-tuned"]
    print("\n| model           | style loss | gap kept | KL to BF16 | sign rate | cosine | gain |")
    print("| --- " * 7 + "|")
    for name, result in results.items():
        kept = (base.loss - result.loss) / (base.loss - tuned.loss)
        kl = float((tuned.log_p.exp() * (tuned.log_p - result.log_p)).sum(-1).mean())
        delta = "        - |      - |    - |"
        if name in reports:
            delta = "{sign_rate:9.3f} | {cosine:6.3f} | {gain:4.2f} |".format(**reports[name].metrics())
        print(f"| {name:15} | {result.loss:10.4f} | {kept:8.1%} | {kl:10.2e} | {delta}")
    for name, result in results.items():
        print(f"\n{name}:", *result.lines, sep="\n  ")


@torch.no_grad()
def mean_loss(model: nn.Module, held_out: Tensor) -> float:
    losses = [
        F.cross_entropy(log_probs(model, rows).flatten(0, 1), rows[:, 1:].flatten())
        for rows in held_out.split(4)
    ]
    return float(torch.stack(losses).mean())


def tune_real_model(args: argparse.Namespace, steps: int, tests: int) -> None:
    """Teaches the style to a model of the Hub, or of a folder, and compares two exports."""
    try:
        base = local_folder(args.model)
    except CheckpointError as error:  # of the Hub
        sys.exit(f"{error}\nNothing was trained. Leave --model out for a demo that downloads nothing.")
    if not (base / "config.json").is_file():
        sys.exit(
            f"--model {args.model}: expected ORG/NAME on the Hub, or a folder with config.json and tokenizer."
        )
    say(f"{args.model}: {steps} steps In Title Case, then two exports")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    passages = standard_library_text()
    seen, unseen = (
        torch.tensor(tokenizer(in_title_case("".join(part)[:1_000_000]))["input_ids"])
        for part in (passages[400:], passages[:400])
    )
    held_out = cut_outs(unseen, tests, seed=1)
    losses = {"base": mean_loss(model.eval(), held_out)}
    searches = {"absmax": ScaleSearch.absmax(), "default": None}
    exports = {
        name: DeltaAwareQuantization(dirpath=str(args.out / name), base=str(base), search=search)
        for name, search in searches.items()
    }
    data = cut_outs(seen, steps * BATCH, args.seed + 1)
    train(model.train(), data, args.lr, [*exports.values()], tokenizer)
    losses["fine-tuned"] = mean_loss(model.eval(), held_out)
    say("Every checkpoint, reloaded with transformers, on text that none was trained on")
    print("\n| model      | style loss | gap kept | sign rate | cosine | gain |\n" + "| --- " * 6 + "|")
    for name in ("base", "fine-tuned", *exports):
        figures = "        - |      - |    - |"
        if name in exports:
            found: Any = exports[name].report
            losses[name] = mean_loss(
                AutoModelForCausalLM.from_pretrained(found.path).float().eval(), held_out
            )
            figures = "{sign_rate:9.3f} | {cosine:6.3f} | {gain:4.2f} |".format(**found.metrics())
        kept = (losses["base"] - losses[name]) / (losses["base"] - losses["fine-tuned"])
        print(f"| {name:10} | {losses[name]:10.4f} | {kept:8.1%} | {figures}")
    say(f"Done. {exports['default'].exports[-1]} loads in transformers, vLLM and SGLang.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune, export to FP8, compare.")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of all checkpoints")
    parser.add_argument(
        "--base-format", choices=("fp8", "bf16"), default="fp8", help="what the base is stored as"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps only: checks that everything runs")
    parser.add_argument("--model", help="ORG/NAME on the Hub, or a folder: fine-tune that model instead")
    parser.add_argument("--steps", type=int, help="with --model: optimizer steps (default: 150)")
    parser.add_argument("--lr", type=float, default=1.5e-5, help="with --model: learning rate")
    args = parser.parse_args()
    base_steps, tune_steps, tune_lr, tests, new_bytes = (
        (3, 3, 1e-4, 4, 8) if args.fast else (450, 150, 1.5e-5, 96, 90)
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    if args.model:
        return tune_real_model(args, args.steps or tune_steps, tests)

    passages = standard_library_text()
    seen, unseen = "".join(passages[400:]), "".join(passages[:400])
    say(f"Base: {base_steps} steps on {len(seen) / 1e6:.1f} MB of English")
    torch.manual_seed(args.seed)
    model = new_model()
    train(model, windows(seen, base_steps * BATCH, args.seed), 3e-3, [])
    base = unrounded = args.out / "base-bf16"
    model.bfloat16().save_pretrained(base)
    if args.base_format == "fp8":
        base = args.out / "base-fp8"
        export_checkpoint(unrounded, unrounded, base, scheme="FP8_BLOCK", search=ScaleSearch.absmax())

    say(f"Fine-tuning: {tune_steps} steps In Title Case from {base}, then five exports")
    model = new_model()  # float32 masters that start from exactly the values of the base checkpoint
    model.load_state_dict({name: tensor.float() for name, tensor in load_checkpoint(base).items()})
    searches = {"absmax FP8": ScaleSearch.absmax(), "DAQ sign": ScaleSearch(metric="sign"),
                "DAQ cosine": ScaleSearch(metric="cosine"),
                "DAQ hybrid": ScaleSearch(metric="hybrid")}  # fmt: skip
    exports = {
        name: DeltaAwareQuantization(
            dirpath=str(args.out / name.replace(" ", "-")), base=str(base), scheme="FP8_BLOCK", search=search
        )
        for name, search in searches.items()
    }
    exports["DAQ curvature"] = DeltaAwareQuantization(
        dirpath=str(args.out / "DAQ-curvature"), base=str(base), scheme="FP8_BLOCK", rounding="curvature"
    )
    train(
        model, windows(in_title_case(seen), tune_steps * BATCH, args.seed + 1), tune_lr, [*exports.values()]
    )
    model.bfloat16().save_pretrained(args.out / "finetuned-bf16")

    say("Every checkpoint, reloaded with transformers, on text that none was trained on")
    reports = {name: callback.report for name, callback in exports.items() if callback.report}
    folders = {"base": base, "BF16 fine-tuned": args.out / "finetuned-bf16"}
    folders |= {name: Path(report.path) for name, report in reports.items()}
    held_out = windows(in_title_case(unseen), tests, seed=1)
    print_table({name: evaluate(folder, held_out, new_bytes) for name, folder in folders.items()}, reports)
    say(f"Done. {folders['DAQ curvature']} loads in transformers, vLLM and SGLang.")


if __name__ == "__main__":
    main()
