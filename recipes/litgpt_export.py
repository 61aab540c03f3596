"""A LitGPT checkpoint (`lit_model.pth`) becomes a quantized folder.

LitGPT has names of its own and one tensor for queries, keys and values; its own converter takes them apart.
After `litgpt finetune_lora` merge first: `litgpt merge_lora out/final`.

    python recipes/litgpt_export.py out/final base/ fp8/
"""

import sys
import tempfile
from pathlib import Path

import torch
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint  # pyright: ignore
from safetensors.torch import save_file

from daq_lightning import export_checkpoint

BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def main() -> None:
    lit, base, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as temporary:
        folder = Path(temporary)
        convert_lit_checkpoint(lit, folder)
        state = torch.load(folder / "model.pth", mmap=True, weights_only=True)
        weights = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for file in filter(Path.is_file, (lit / name for name in BESIDE)):
            (folder / file.name).write_bytes(file.read_bytes())
        print(export_checkpoint(folder, base, out, progress=True).summary())


if __name__ == "__main__":
    main()
