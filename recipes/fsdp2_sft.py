"""Full fine-tuning of a sharded model (FSDP2), exported to FP8 by all ranks: no rank ever holds the model.

    weights    read one tensor at a time; each rank keeps its rows
    training   ModelParallelStrategy, bfloat16 in the layers, float32 in the shards and the optimizer
    export     each rank searches and writes files of its own, from weights gathered one at a time

Without --model a tiny Llama with random weights is trained, on two processes of a CPU as on eight GPUs:

    python recipes/fsdp2_sft.py
    python recipes/fsdp2_sft.py --devices 8 --model Llama-3.1-8B --steps 500
    srun python recipes/fsdp2_sft.py --nodes 4 --devices 8 --model ...      in a job, see slurm.sh

Started again with the same --out, it goes on from the last checkpoint there. --model takes a folder in which
checkpoint and model have the same names, as Llama, Qwen and Mistral do; models that fuse their experts in
memory need a loader of their own.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from daq_lightning import DeltaAwareQuantization, load_checkpoint

TINY = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                   num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)  # fmt: skip
CONTEXT, BATCH = 128, 4  # tokens of an example, examples of a step and rank


class Tuning(L.LightningModule):
    """Next-token prediction with a model that is made in shards."""

    def __init__(self, folder: str | None, lr: float) -> None:
        super().__init__()
        self.folder, self.lr = folder, lr
        self.model: Any = None
        # the export takes the tokenizer along
        self.tokenizer = AutoTokenizer.from_pretrained(folder) if folder else None

    def configure_model(self) -> None:
        """Runs on every rank, when the process group is there and before the optimizer is made."""
        if self.model is not None:
            return
        config = AutoConfig.from_pretrained(self.folder) if self.folder else TINY
        with torch.device("meta"):  # names and shapes only
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:  # one unit is whole at a time
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to_empty(device=self.device)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(
            self.device
        )  # has buffers, no weights
        weights = load_checkpoint(self.folder) if self.folder else random_weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                whole = weights[name].to(self.device, torch.float32)  # read now, and gone after this line
                parameter.copy_(distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None))
        self.model = model.train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        """Pieces of a text that every Python has; put your data here."""
        text = Path(argparse.__file__).read_text()
        tokens = self.tokenizer(text)["input_ids"] if self.tokenizer else list(text.encode())
        pieces = len(tokens) // CONTEXT
        return DataLoader(torch.tensor(tokens[: pieces * CONTEXT]).view(pieces, CONTEXT), batch_size=BATCH)  # type: ignore[arg-type]


def random_weights() -> dict[str, Tensor]:
    """The same on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY).state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune with FSDP2 and export to FP8.")
    parser.add_argument("--model", help="Hugging Face folder; without it a tiny random Llama")
    parser.add_argument("--out", type=Path, default=Path("outputs/fsdp2"), help="folder of all checkpoints")
    parser.add_argument("--devices", type=int, default=2, help="GPUs (or CPU processes) of a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 20")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--fast", action="store_true", help="a few steps only: checks that everything runs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    gpu = torch.cuda.is_available()
    export = DeltaAwareQuantization(
        dirpath=str(args.out / "exports"),
        base=args.model or "auto",  # a folder is read again; "auto" writes a copy of the weights at the start
        export_on="train_end",
    )
    saver = ModelCheckpoint(args.out / "checkpoints", save_last=True, every_n_train_steps=args.save_every)
    trainer = L.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=args.devices,
        num_nodes=args.nodes,
        strategy=ModelParallelStrategy(
            data_parallel_size=args.devices * args.nodes,
            tensor_parallel_size=1,
            process_group_backend="nccl" if gpu else "gloo",
        ),
        max_steps=args.steps or (3 if args.fast else 20),
        gradient_clip_val=1.0,
        callbacks=[export, saver],
        logger=False,
        enable_model_summary=False,
    )
    last = args.out / "checkpoints" / "last.ckpt"
    trainer.fit(Tuning(args.model, args.lr), ckpt_path=last if last.exists() else None)
    if export.report is not None:
        rank_zero_only(print)(export.report.summary())
        rank_zero_only(print)(f"\n{export.exports[-1]} loads in transformers, vLLM and SGLang.")
    else:
        rank_zero_only(print)("Nothing was left to train, so nothing was exported: raise --steps.")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
