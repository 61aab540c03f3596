"""Two processes: each sums its own tokens, and an export has those of both."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from live import end_process_group

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_statistics_are_those_of_all_ranks_and_training_is_bit_identical(tmp_path, kind):
    from sharded_runs import launch

    for code, output in launch(__file__, [kind, str(tmp_path)], 2):
        assert code == 0, output
    for export, source in {"activations": "activations", "validation": "validation",
                           "budget": "activations"}.items():  # fmt: skip
        reports = [json.loads((tmp_path / f"{export}{rank}.json").read_text()) for rank in (0, 1)]
        assert reports[0] == reports[1]
        for name, entry in reports[0].items():
            assert entry["source"] == f"{source} and update", name
            assert entry["loss"] < entry["nearest_loss"]
        assert reports[0]["model.layers.0.mlp.down_proj.weight"]["tokens"] == 2 * 4 * 2 * 7


def test_the_sums_of_two_ranks_are_those_of_one_process_with_all_data(tmp_path):
    from sharded_runs import launch

    for world in (1, 2):
        for code, output in launch(__file__, ["sums", str(tmp_path)], world):
            assert code == 0, output
    one, two = (json.loads((tmp_path / f"sums{world}.json").read_text()) for world in (1, 2))
    assert set(one) == set(two)
    for name in one:
        assert two[name]["tokens"] == one[name]["tokens"]
        assert two[name]["inputs"] == pytest.approx(one[name]["inputs"], rel=1e-4)
        # of a mean over half of the data, gradients are twice as large
        assert two[name]["outputs"] == pytest.approx(4 * one[name]["outputs"], rel=1e-3)


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def train(folder: Path, kind: str) -> None:
    import lightning.pytorch as L
    import torch
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from live import Tuning, data, make_trainer
    from torch.distributed.fsdp import fully_shard

    from daq_lightning import DeltaAwareQuantization

    class Sharded(Tuning):
        def validation_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_model(self) -> None:
            if kind == "fsdp2" and not hasattr(self.model, "set_requires_gradient_sync"):
                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def fit(*callbacks: L.Callback) -> Tuning:
        L.seed_everything(3, verbose=False)
        strategy = DDPStrategy(process_group_backend="gloo")
        if kind == "fsdp2":
            strategy = ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
            )
        module = Sharded()
        trainer = make_trainer(
            folder, *callbacks, strategy=strategy, devices=2, max_epochs=1, num_sanity_val_steps=0,
            check_val_every_n_epoch=9,  # FSDP2 leaves parts of a model whole after one
        )  # fmt: skip
        trainer.fit(module, data(16), data(16))
        return module

    exports = {
        source: DeltaAwareQuantization(
            dirpath=str(folder / source), rounding="curvature", max_shard_bytes=40_000, curvature=source,
            every_n_train_steps=every,
        )
        for source, every in (("validation", 3), ("activations", None))  # of which the latter has hooks then
    }  # fmt: skip
    # whose plan, and so what each rank exports, is only known when all is measured
    exports["budget"] = DeltaAwareQuantization(
        dirpath=str(folder / "budget"), rounding="curvature", max_shard_bytes=40_000, scheme="W4A16",
        budget="6.5 bits", curvature="activations",
    )  # fmt: skip
    with_it, without = fit(*exports.values()), fit()
    for one, two in zip(with_it.parameters(), without.parameters(), strict=True):
        one, two = (getattr(p.detach(), "_local_tensor", p.detach()) for p in (one, two))
        assert torch.equal(one, two)
    for source, export in exports.items():
        assert export.report is not None
        if source == "budget":
            placement = export.report.placement
            assert placement is not None
            assert placement.measure == "curvature"
            assert len({group.rung for group in placement.groups}) > 1
        roundings = {tensor.name: tensor.rounding.to_dict() for tensor in export.report.tensors}
        (folder / f"{source}{rank()}.json").write_text(json.dumps(roundings))


def sums(folder: Path) -> None:
    """The same eight sequences, in one process or half of them in each of two."""
    import torch
    from live import tiny_llama

    from daq_lightning.export.collected import AllCollected, Collected
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.model.observer import Layer, Observer, Sums

    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if world > 1:
        torch.distributed.init_process_group("gloo")
    ranks = Ranks.all()
    model = tiny_llama()
    batch = torch.randint(1, 32, (8, 8), generator=torch.Generator().manual_seed(1))
    mine = batch[ranks.rank :: ranks.size]
    inside = model.model.layers[0]
    layers = {
        name: Layer(name=name, group="qkv" if name in "qkv" else name, shape=(128, 128), modules=(module,))
        for name, module in {
            "q": inside.self_attn.q_proj, "k": inside.self_attn.k_proj, "down": inside.mlp.down_proj
        }.items()
    }  # fmt: skip
    total = Sums()
    with Observer(list(layers.values()), total):
        model(input_ids=mine, labels=mine).loss.backward()
    collected = Collected.of(total)
    owners = {"q": 0, "k": 0, "down": ranks.size - 1}
    if ranks.size > 1:
        collected = collected.summed(owners, ranks)
    found = AllCollected([collected], "activations")
    assert set(found) == {name for name, owner in owners.items() if owner == ranks.rank}
    mine_found = {
        name: {
            "tokens": one.tokens,
            "inputs": float(one.inputs.diagonal().sum()),
            "outputs": float(one.outputs.diagonal().sum()),
        }
        for name, one in found.items()
    }
    everyone = ranks.union(mine_found)
    if ranks.rank == 0:
        (folder / f"sums{ranks.size}.json").write_text(json.dumps(everyone))
    ranks.close()


if __name__ == "__main__":
    if sys.argv[1] == "sums":
        sums(Path(sys.argv[2]))
    else:
        train(Path(sys.argv[2]), sys.argv[1])
    end_process_group()
