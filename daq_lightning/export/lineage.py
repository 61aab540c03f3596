"""Where a new export stands in a chain: its parent, and the proof that its base is what it is said to be.

    chain_from="weights"    the base has the fingerprints of the weights that the parent was exported from
    chain_from="deployed"   the base equals the parent's dequantized FP8 weights, value by value

The two differ by the quantization error. Which one a stage began with is said and checked, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.folder import MANIFEST
from daq_lightning.checkpoint.manifest import ChainFrom, Lineage, Manifest
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.export.turns import in_turn, shares


def make_lineage(
    lineage: Lineage,
    base: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Lineage, Mapping[str, Tensor] | None]:
    """The place of a new export in a chain, after checking that its base is what it is said to be.

    Args:
        lineage: What is known of its base; the lineage of a first stage.
        base: The tensors of the base.
        names: The tensors that are quantized.
        parent: Folder of the stage before; None takes the base's folder if that is an export.
        chain_from: Whether the base is the parent's high-precision "weights" or its "deployed" ones; None
            begins a chain.
        ranks: The processes that share the comparison; all of them call this.

    Returns:
        The lineage, and the weights of the chain's root if they are at hand.

    Raises:
        CheckpointError: There is no parent, or the base is not what `chain_from` says.
    """
    if chain_from is None:
        if parent is not None:
            raise CheckpointError(
                f"parent={parent!r}: say what this stage was trained from with chain_from='deployed' (the "
                "parent's dequantized FP8 weights) or chain_from='weights' (the high-precision weights it "
                "was made from)."
            )
        return lineage, None
    if chain_from not in ("weights", "deployed"):
        raise CheckpointError(f"chain_from={chain_from!r}: expected 'weights' or 'deployed'.")
    parent = parent or (lineage.base_path if lineage.base_kind == "folder" else "")
    if not parent or not (Path(parent) / MANIFEST).is_file():
        raise CheckpointError(
            f"chain_from={chain_from!r} needs parent='<folder of the export before>'; {parent or 'the base'} "
            "is none."
        )
    manifest, deployed = ranks.together(lambda: (Manifest.load(parent), Checkpoint(parent)))
    _check_base(deployed, manifest, chain_from, base, list(names), ranks)
    root = (Path(parent) / manifest.lineage.root).resolve() if manifest.lineage.root else None
    linked = replace(
        lineage,
        stage=manifest.lineage.stage + 1,
        parent=str(Path(parent).absolute()),
        parent_fingerprint=manifest.fingerprint,
        chain_from=chain_from,
        root=str(root or ""),
    )
    return linked, Checkpoint(root) if root is not None and root.is_dir() else None


def ancestors(lineage: Lineage) -> list[Path]:
    """The folders of the stages before an export, the nearest first, as far as they are there."""
    stages: list[Path] = []
    stage = Path(lineage.parent) if lineage.parent else None
    while stage is not None and stage.is_dir() and not any(stage.samefile(known) for known in stages):
        stages.append(stage)
        try:
            before = Manifest.load(stage).lineage
        except CheckpointError:  # of an ancestor of the parent, which `chain` reports
            break
        stage = stage / before.parent if before.parent else None
    return stages


def _check_base(
    deployed: Checkpoint,
    manifest: Manifest,
    chain_from: ChainFrom,
    base: Mapping[str, Tensor],
    names: list[str],
    ranks: Ranks,
) -> None:
    recorded = manifest.tensors
    common = [name for name in names if name in recorded and name in base]
    agreement = Agreement(ranks)
    mine = []
    for name, tensor in in_turn(base, shares(common, ranks), ranks, agreement):
        with agreement.attempt():
            if chain_from == "deployed":
                equal = torch.equal(deployed[name].float(), tensor.detach().cpu().float())
            else:
                equal = fingerprint(tensor) in recorded[name]["weights"].values()
            if not equal:
                mine.append(name)
    found = {name for part in ranks.gather(mine) for name in part}
    wrong = [name for name in common if name in found]
    if wrong:
        what = {
            "weights": "the high-precision weights it was exported from",
            "deployed": "its dequantized FP8 weights",
        }[chain_from]
        other = "deployed" if chain_from == "weights" else "weights"
        raise CheckpointError(
            f"chain_from={chain_from!r} says that this stage began with {what}, but {len(wrong)} of "
            f"{len(names)} base weights differ from those of {deployed.path} ({', '.join(wrong[:3])}). Pass "
            f"the base that training really began with, or chain_from={other!r}."
        )
