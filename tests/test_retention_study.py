"""The retention study: its weights are those of an export, and rows it has are not computed again."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks.retention import settings as s
from benchmarks.retention.curvature import Curvature, gather
from benchmarks.retention.in_memory import quantized
from benchmarks.retention.measure import figures_of_model, figures_of_weights
from benchmarks.retention.rows import Key, Rows
from benchmarks.retention.settings import Setting, settings
from benchmarks.retention.subjects import Batch, Subject
from benchmarks.retention.tables import all_tables
from daq_lightning import export_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)


@pytest.fixture(scope="module")
def subject(folders):
    base, post = (dict(load_checkpoint(folder).items()) for folder in folders)
    network = AutoModelForCausalLM.from_pretrained(folders[1]).float().eval()
    tokens = torch.randint(network.config.vocab_size, (8, 13), generator=torch.Generator().manual_seed(0))
    batches = [Batch({"input_ids": part[:, :-1]}, part[:, 1:]) for part in tokens.split(4)]
    return Subject(
        model="toy",
        base_kind="bf16",
        seed=0,
        network=network,
        post=post,
        base=base,
        quantized=tuple(name for name in post if name.endswith("_proj.weight")),
        texts={"style": batches, "other": batches[:1]},
        training=batches[1:],
        whole_run=batches,
        own_text=lambda: batches,
    )


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        s.HYBRID,
        Setting(objective="cosine", low=0.8, high=1.25, scope="tensor"),
        Setting(objective="sign", low=0.9, high=1.11, scheme="FP8_DYNAMIC"),
    ],
    ids=lambda setting: setting.name,
)
def test_weights_and_figures_are_those_of_an_export(setting, subject, folders, tmp_path):
    base, post = folders
    report = export_checkpoint(post, base, tmp_path / "fp8", scheme=setting.scheme, search=setting.search())
    exported = load_checkpoint(tmp_path / "fp8", dtype=torch.float32)
    ours = quantized(subject, setting)
    assert set(ours.weights) == {tensor.name for tensor in report.tensors} == set(subject.quantized)
    for name, weight in ours.weights.items():
        assert torch.equal(weight, exported[name]), name
    figures = figures_of_weights(ours.stats)
    assert {name: figures[name] for name in report.metrics()} == pytest.approx(report.metrics())


def test_settings_have_names_of_their_own():
    for model in ("toy", "minilm"):
        for base in ("fp8", "bf16", "lora"):
            every = settings(model, base)
            assert len({setting.name for setting in every}) == len(every) > 20


def test_what_is_not_quantized_keeps_all_and_the_base_keeps_nothing(subject):
    post, base = (Setting(kind=kind) for kind in ("post", "base"))
    kept = figures_of_model(subject, quantized(subject, post).weights, post)
    assert (kept["style_gap_kept"], kept["style_kld_mean"], kept["style_update_gain"]) == (1, 0, 1)
    lost = figures_of_model(subject, quantized(subject, base).weights, base)
    assert lost["style_gap_kept"] == 0
    assert lost["style_update_gain"] == pytest.approx(0, abs=1e-9)
    assert lost["style_kld_mean"] == pytest.approx(lost["style_kld_base"])


def test_statistics_are_those_of_autograd(subject):
    """Of one layer against the gradient of its output and weight, taken without hooks on modules."""
    name = "model.layers.0.mlp.down_proj.weight"
    subject.put(subject.post)
    found = gather(subject.network, subject.quantized, subject.training[:1])
    layer = subject.network.get_submodule(name.removesuffix(".weight"))
    seen = {}
    forward = layer.forward

    def spied(x):
        seen["x"], seen["out"] = x, forward(x)
        return seen["out"]

    layer.forward = spied
    batch = subject.training[0]
    logits = subject.network(**batch.inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    y, gradient = torch.autograd.grad(loss, [seen["out"], layer.weight])
    layer.forward = forward
    x, y = (tensor.detach().flatten(0, 1).double() for tensor in (seen["x"], y))
    for ours, exact in (
        (found.activations[name].inputs, x.T @ x),
        (found.activations[name].outputs, y.T @ y),
        (found.gradients[name].inputs, gradient.double().T @ gradient.double()),
        (found.gradients[name].outputs, gradient.double() @ gradient.double().T),
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    shared = [other.split(".")[-2] for other in found.shared["model.layers.1.self_attn.k_proj.weight"]]
    assert sorted(shared) == ["k_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    "setting", [s.UPDATE, s.INPUTS_UPDATE, s.gptq()[1], s.ACTIVATIONS_UPDATE, s.GRADIENTS, s.SELF],
    ids=lambda setting: setting.rounding,
)  # fmt: skip
def test_every_rounding_beats_nearest_by_its_own_statistics_or_changes_nothing(setting, subject):
    nearest = quantized(subject, Setting()).weights
    rounded = quantized(subject, setting, Curvature(subject)).weights
    assert any(not torch.equal(rounded[name], nearest[name]) for name in nearest)
    for name, weight in rounded.items():  # the same scales: at most a few steps away
        step = subject.post[name].float().abs().max() / 448 * 32
        assert (weight - nearest[name]).abs().max() <= 4 * step


def test_statistics_are_those_of_the_last_batches_or_of_the_whole_run(subject):
    name = "model.layers.1.mlp.down_proj.weight"
    last = replace(s.DAMPED, scheme="NVFP4A16")
    whole = replace(last, whole_run=True)
    every = replace(subject, training=subject.whole_run)
    of_last, of_whole = (Curvature(subject).factors(name, setting) for setting in (last, whole))
    of_every = Curvature(every).factors(name, last)
    for side in ("inputs", "outputs"):
        last_KK, whole_KK, every_KK = (getattr(of, side).unit_upper for of in (of_last, of_whole, of_every))
        assert torch.equal(whole_KK, every_KK)
        assert not torch.equal(whole_KK, last_KK)
    assert whole in {
        replace(one, objective="absmax", low=1.0, high=1.0) for one in s.every_four_bit("NVFP4A16")
    }


def test_activations_are_rounded_where_a_setting_asks_for_it(subject):
    figures = [
        figures_of_model(subject, subject.post, Setting(kind="post", activations=activations))
        for activations in (True, False)
    ]
    assert figures[0]["style_kld_mean"] > 0
    assert figures[1]["style_kld_mean"] == 0  # and undone afterwards


def test_rows_outlast_a_cut(tmp_path):
    file, setting = tmp_path / "rows.csv", Setting()
    rows = Rows(file)
    rows.add(Key("toy", "fp8", 0, setting.name), setting, 1.0, {"gain": 0.5, "cosine": float("nan")})
    rows.add(Key("toy", "fp8", 1, setting.name), setting, 1.0, {"gain": 0.25, "cosine": 1.0})
    file.write_text(file.read_text()[:-3])
    again = Rows(file)
    assert [row["gain"] for row in again.of("toy", "fp8", setting)] == [0.5]
    again.add(Key("toy", "fp8", 1, setting.name), setting, 1.0, {"gain": 0.25, "cosine": 1.0})
    assert [row["gain"] for row in Rows(file).of("toy", "fp8", setting)] == [0.5, 0.25]
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="another version"):
        Rows(file)


def test_tables_show_mean_least_and_largest(tmp_path, subject):
    rows, setting = Rows(tmp_path / "rows.csv"), Setting()
    figures = figures_of_weights(quantized(subject, setting).stats)
    figures |= figures_of_model(subject, quantized(subject, setting).weights, setting)
    for seed, kept in enumerate((0.25, 0.75)):
        rows.add(Key("toy", "bf16", seed, setting.name), setting, 1.0, figures | {"style_gap_kept": kept})
    table = all_tables(rows)
    assert "(2 seeds)" in table
    assert "| absmax, block | 50.0 (25.0-75.0) |" in table


@pytest.mark.slow
def test_quick_study_runs_and_is_not_computed_twice(tmp_path):
    command = [sys.executable, "-m", "benchmarks.retention", "--quick", "--out", str(tmp_path)]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    first = subprocess.run(command, check=False, **run)
    assert first.returncode == 0, first.stderr[-3000:]
    for heading in ("Table 2", "Table 3", "Table 4", "Table 5", "Rounding", "activations alone: the floor"):
        assert heading in first.stdout
    assert (tmp_path / "retention.svg").read_text().startswith("<?xml")
    written = (tmp_path / "rows.csv").read_bytes()
    again = subprocess.run(command, check=False, **run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "to go" not in again.stdout
    assert (tmp_path / "rows.csv").read_bytes() == written
    assert (tmp_path / "tables.md").read_text() in again.stdout
    full = subprocess.run([part for part in command if part != "--quick"], check=False, **run)
    assert full.returncode != 0
    assert "holds a quick study" in full.stderr
