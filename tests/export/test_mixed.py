"""A budget puts each weight on a rung: the best ones that fit, what servers fuse together, and every reader
finds them."""

import dataclasses
import itertools
import json
import math
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name, match_targets

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit.chain import Chain
from daq_lightning.audit.evaluate import evaluate
from daq_lightning.audit.recompute import differences, recompute
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.checkpoint.budget import Budget
from daq_lightning.checkpoint.layouts import read_layouts
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.schemes import LADDERS, SCHEMES
from daq_lightning.cli import main
from daq_lightning.export.job import prepare
from daq_lightning.export.losses import losses_of, rows_of
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.scales import search_scales
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.export.stream import Pair
from daq_lightning.export.written import WrittenWeights
from daq_lightning.numerics.quantize import dequantize
from daq_lightning.numerics.rounding.statistics import Statistics
from daq_lightning.training.fallback import _as_scheme

QUICK = ScaleSearch(n_coarse=2, n_fine=1)
LADDERS_TRIED = {
    "W4A16": ("W4A16", "FP8A16", "16"),
    "NVFP4A16": ("NVFP4A16", "FP8_DYNAMIC", "16"),
    "MXFP4A16": ("MXFP4A16", "W8A8", "16"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Weights of unequal updates, so that rungs differ."""
    base, post = tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(post, dtype="auto")
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 2:
                size = 2.0 ** (index % 3 + (1 if "layers.0" in name else -6))
                parameter.copy_(before[name] + (parameter - before[name]) * size)
    model.save_pretrained(post)
    return base, post


def job_of(pair, curvature=None, **settings):
    base, post = pair
    settings = {"search": QUICK, "scheme": "W4A16", "rounding": "nearest"} | settings
    return prepare(Source.of(post), Checkpoint(base), ExportSettings(**settings), curvature=curvature)


def placed(job):
    return within_budget(job, stack=ExitStack())


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """Ladder -> report of an export on all its rungs."""
    base, post = pair
    out = tmp_path_factory.mktemp("out")
    return {
        scheme: export_checkpoint(post, base, out / scheme, search=QUICK, budget="8 bits", ladder=ladder)
        for scheme, ladder in LADDERS_TRIED.items()
    }


def rungs(report):
    return {name: group.rung for group in report.placement.groups for name in group.names}


@pytest.mark.parametrize("scheme", LADDERS_TRIED)
def test_transformers_decompresses_every_group_to_the_weights_that_we_read(exported, scheme):
    report = exported[scheme]
    assert set(rungs(report).values()) == set(LADDERS_TRIED[scheme])
    ours = load_checkpoint(report.path)
    model = transformers.AutoModelForCausalLM.from_pretrained(report.path, dtype="auto")
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    read = dict(model.named_parameters())
    assert set(rungs(report)) <= set(read)
    for name in rungs(report):
        assert torch.equal(read[name], ours[name]), name
    schemes = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    for name, rung in rungs(report).items():
        found = schemes.get(name.removesuffix(".weight"))
        assert (found is None) == (rung == "16")
        if found is not None:
            assert found.weights.num_bits == SCHEMES[rung].format.bits
            assert (found.input_activations is not None) == SCHEMES[rung].quantized_activations


@pytest.mark.parametrize("scheme", LADDERS_TRIED)
def test_the_config_has_a_group_for_each_scheme_as_compressed_tensors_reads_it(exported, scheme):
    report = exported[scheme]
    config = json.loads((Checkpoint(report.path).path / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    assert read.format == "mixed-precision"
    forms = {group.format for group in read.config_groups.values()}
    assert len(forms) == len(read.config_groups) == 2
    linear = torch.nn.Linear(1, 1)
    for name, rung in rungs(report).items():
        module = name.removesuffix(".weight")
        groups = [
            group for group in read.config_groups.values() if match_targets(module, linear, group.targets)
        ]
        assert len(groups) == (rung != "16")
        assert (module in config["ignore"]) == (rung == "16")
    assert "lm_head" in config["ignore"]


@pytest.mark.parametrize("scheme", LADDERS_TRIED)
def test_every_command_takes_the_scheme_of_each_weight(exported, pair, scheme, capsys):
    report, (base, post) = exported[scheme], pair
    assert verify_checkpoint(report.path) == []
    again = recompute(report, Checkpoint(post), Checkpoint(base))
    assert differences(report, again) == {}
    assert Chain.open(report.path).verify() == []
    assert ExportReport.load(report.path).placement == report.placement
    assert report.scheme == " + ".join(LADDERS_TRIED[scheme][:2])
    assert {tensor.name: tensor.scheme for tensor in report.tensors} == {
        name: rung for name, rung in rungs(report).items() if rung != "16"
    }
    card = (Checkpoint(report.path).path / "README.md").read_text()
    for rung in set(rungs(report).values()) - {"16"}:
        count = list(rungs(report).values()).count(rung)
        assert f"{count} weights of linear layers, as {rung}" in card
    assert "budget 8 bits" in card
    assert main(["inspect", report.path]) == 0
    assert report.scheme in capsys.readouterr().out


def test_an_evaluation_quantizes_the_inputs_of_the_modules_whose_scheme_does(exported, pair):
    report = exported["NVFP4A16"]  # beside FP8_DYNAMIC
    windows = [torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(5)).tolist()]
    files = {"export": load_checkpoint(report.path), "post": load_checkpoint(pair[1])}
    found = evaluate(files, windows)
    assert (found.scheme, found.quantized_activations, found.unseen) == (report.scheme, True, ())
    tokens, logs = torch.tensor(windows), {}
    for role, path in (("export", report.path), ("post", pair[1])):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        with torch.no_grad():  # compressed-tensors quantizes inputs by the schemes of the config
            logs[role] = model(tokens[:, :-1]).logits.double().log_softmax(-1).numpy()
    kld = (np.exp(logs["post"]) * (logs["post"] - logs["export"])).sum(-1).mean()
    plain = evaluate(files, windows, weights_only=True)
    near, far = (abs(one.figures["kld_mean"] - kld) for one in (found, plain))
    assert near < 0.5 * far  # bfloat16 rounds both


@pytest.mark.parametrize("damage", ["groups", "rung", "losses", "elements", "measure"])
def test_a_report_whose_placement_is_none_is_refused(exported, tmp_path, damage):
    content = json.loads((Checkpoint(exported["W4A16"].path).path / "daq_report.json").read_text())
    placement = content["placement"]
    if damage == "rung":
        placement["groups"][0]["rung"] = "INT3"
    elif damage == "losses":
        placement["groups"][0]["losses"] = {"W4A16": None}
    else:
        placement[damage] = {"groups": 3, "elements": 0, "measure": "luck"}[damage]
    (tmp_path / "daq_report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="rungs and losses in placement"):
        ExportReport.load(tmp_path)


def test_fallbacks_keep_the_rungs_of_the_rest_or_leave_the_budget(pair):
    job = placed(job_of(pair, budget="6 bits"))
    before = {tensor.spec.name: tensor.layout for tensor in job.plan.quantized}
    worst = "model.layers.0.mlp.down_proj"
    kept = job.planned_as(dataclasses.replace(job.settings, ignore=(worst,)))
    del before[f"{worst}.weight"]
    assert {tensor.spec.name: tensor.layout for tensor in kept.plan.quantized} == before
    assert len(kept.placement.groups) == len(job.placement.groups) - 1
    plain = _as_scheme(job, "W8A8")
    assert plain.placement is None
    assert plain.plan.layouts.scheme == "W8A8"


def test_zero_points_beside_another_scheme_are_read_as_they_are_meant(pair, tmp_path):
    report = export_checkpoint(
        pair[1], pair[0], tmp_path / "out", scheme="W4A16_ASYM", search=QUICK, budget="6 bits"
    )
    assert {rung for rung in rungs(report).values()} >= {"W4A16_ASYM", "FP8A16"}
    assert verify_checkpoint(report.path) == []
    assert differences(report, recompute(report, Checkpoint(pair[1]), Checkpoint(pair[0]))) == {}
    assert any("not beside another scheme" in note for note in report.notes)


@pytest.mark.parametrize("scheme", LADDERS_TRIED)
def test_what_a_validation_sees_is_what_the_files_hold(exported, pair, scheme):
    report = exported[scheme]
    job = job_of(pair, scheme=scheme, budget=report.placement.budget, ladder=LADDERS_TRIED[scheme])
    plan = job.placed_as(report.placement).plan
    folder = Checkpoint(report.path).path
    written = WrittenWeights(plan, folder, ["model.safetensors"])
    read = load_checkpoint(folder, torch.float32)
    for name in rungs(report):
        assert torch.equal(written[name].float(), read[name].float()), name


def losses_from_files(pair, out, ladder):
    """Rung -> name -> squared error over squared update, in float64, of uniform exports as they are read."""
    base, post = (load_checkpoint(path) for path in pair)
    found = {}
    for rung in ladder:
        if rung == "16":
            found[rung] = dict.fromkeys(post, 0.0)
            continue
        export_checkpoint(pair[1], pair[0], out / rung, scheme=rung, search=QUICK)
        read = load_checkpoint(out / rung, torch.float32)
        found[rung] = {
            name: float(
                np.square(read[name].double().numpy() - post[name].double().numpy()).sum()
                / np.square(post[name].double().numpy() - base[name].double().numpy()).sum()
            )
            for name in post
            if name.endswith("_proj.weight")
        }
    return found


def test_no_other_placement_that_fits_loses_less(exported, pair, tmp_path):
    report, ladder = exported["W4A16"], LADDERS_TRIED["W4A16"]
    measured = losses_from_files(pair, tmp_path, ladder)
    placement = report.placement
    for group in placement.groups:
        for rung in ladder:
            assert group.losses[rung] == pytest.approx(
                sum(measured[rung][name] for name in group.names), rel=1e-4, abs=1e-12
            )
    best = min(
        math.fsum(group.losses[rung] for group, rung in zip(placement.groups, chosen, strict=True))
        for chosen in itertools.product(ladder, repeat=len(placement.groups))
        if sum(group.sizes[rung] for group, rung in zip(placement.groups, chosen, strict=True))
        <= placement.capacity
    )
    assert len(placement.groups) == 8
    assert placement.loss() == pytest.approx(best, rel=1e-12)
    files = Checkpoint(report.path).raw
    parts = [name for name in files.entries if any(name.startswith(weight) for weight in rungs(report))]
    assert placement.size == sum(files.entries[name].nbytes for name in parts) <= placement.capacity
    assert placement.bits <= 8


def test_more_bytes_never_lose_more(pair):
    low, high = 4.2, 15.9
    found = [placed(job_of(pair, budget=f"{bits:.4g} bits")).placement for bits in np.linspace(low, high, 6)]
    losses = [placement.loss() for placement in found]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    for placement in found:
        assert placement.size <= placement.capacity
        assert Budget.of(placement.budget).bytes_for(placement.elements) == placement.capacity


def test_what_servers_fuse_is_on_one_rung(exported, tmp_path):
    for report in exported.values():
        for layer in (0, 1):
            found = rungs(report)
            for leaves in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
                assert len({found[f"model.layers.{layer}.{leaf}_proj.weight"] for leaf in leaves}) == 1
    moe = tiny_models.make_pair(tmp_path, tiny_models.qwen3_moe)
    job = placed(job_of(moe, budget="6 bits", ladder=("W4A16", "FP8_DYNAMIC", "16")))
    experts = [group for group in job.placement.groups if ".experts." in group.names[0]]
    assert sorted(len(group.names) for group in experts) == [6, 6]  # two experts of three projections
    assert {tensor.layout.scheme.name for tensor in job.plan.quantized} == {"W4A16", "FP8_DYNAMIC"}


@pytest.mark.parametrize("factory", [tiny_models.qwen3_moe, tiny_models.mixtral])
@pytest.mark.parametrize(
    "rungs_of_experts", [("W4A16", "W4A16"), ("W4A16", "FP8_DYNAMIC"), ("16", "FP8_DYNAMIC")]
)
def test_experts_are_found_by_the_names_of_every_reader(tmp_path, factory, rungs_of_experts):
    job = placed(job_of(tiny_models.make_pair(tmp_path, factory), budget="6 bits"))
    chosen = {"0": rungs_of_experts[0], "1": rungs_of_experts[1]}
    groups = tuple(
        dataclasses.replace(group, rung=chosen[group.names[0].split(".")[2]])
        if ".experts." in group.names[0]
        else dataclasses.replace(group, rung="FP8_DYNAMIC")
        for group in job.placement.groups
    )
    job = job.placed_as(dataclasses.replace(job.placement, groups=groups))
    config = job.plan.layouts.quantization_config(job.plan.ignore)
    read = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    layouts = read_layouts(config)
    for tensor in job.plan.tensors:
        if tensor.role != "expert":
            continue
        layer, _, leaf = tensor.spec.name.removesuffix(".weight").rpartition(".")
        rung = chosen[layer.split(".")[2]]
        for name in (f"{layer}.{leaf}", f"{layer}.gate_proj", f"{layer}.w1"):
            found = [
                group
                for group in read.config_groups.values()
                if any(match_name(name, target) for target in group.targets)
            ]
            if len(read.config_groups) > 1 and rung != "16":
                assert [group.weights.num_bits for group in found] == [SCHEMES[rung].format.bits]
                assert layouts.of(name).scheme.name == rung
        assert (tensor.spec.name.removesuffix(".weight") in config["ignore"]) == (rung == "16")
    note = any("one scheme for the experts of all layers" in note for note in job.plan.notes)
    assert note == (len(set(rungs_of_experts)) > 1 and len(read.config_groups) > 1)


@pytest.mark.parametrize(("budget", "word"), [("4 bits", "below the least"), ("17 bits", "above the most")])
def test_a_budget_that_no_rungs_meet_is_refused_with_both_numbers(pair, tmp_path, budget, word):
    base, post = pair
    with pytest.raises(CheckpointError, match=word) as caught:
        export_checkpoint(post, base, tmp_path / "out", scheme="W4A16", budget=budget)
    elements = job_of(pair).plan.quantized
    count = sum(math.prod(tensor.spec.shape) for tensor in elements)
    low = sum(spec.nbytes for tensor in elements for spec in tensor.stored.values())
    wanted = low if word.startswith("below") else 2 * count
    given = int(float(budget.split()[0]) * count / 8)
    assert f"{given:,} bytes" in str(caught.value)
    assert f"{wanted:,} bytes" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["4.5", "4.5 bits", "2 kB", 3000, "3 MiB"])
def test_budgets_are_bits_or_bytes(budget):
    meant = {"4.5": 4, "4.5 bits": 562, "2 kB": 2000, 3000: 3000, "3 MiB": 3 * 2**20}[budget]
    assert Budget.of(budget).bytes_for(1000) == meant


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": "much"}, "mean bits"),
        ({"budget": "-2 bits"}, "mean bits"),
        ({"budget": True}, "mean bits"),
        ({"budget": "nan bits"}, "mean bits"),
        ({"budget": "1e308 GB"}, "mean bits"),
        ({"ladder": ("W4A16", "16")}, "give a budget"),
        ({"budget": 9, "ladder": ("W4A16",)}, "two or more"),
        ({"budget": 9, "ladder": ("16", "W4A16")}, "'16' last"),
        ({"budget": 9, "ladder": ("W4A16", "W4A16")}, "each once"),
        ({"budget": 9, "ladder": ("W4A16", "INT3")}, "'INT3'"),
        ({"budget": 9, "scheme": "W8A8", "ladder": ("W4A16", "16")}, "begins with 'W4A16'"),
    ],
)
def test_budgets_and_ladders_that_are_none_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ExportSettings(**arguments)


def test_the_fp8_container_holds_one_scheme(pair):
    with pytest.raises(CheckpointError, match="holds one scheme"):
        job_of(pair, scheme="FP8_BLOCK", container="fp8", budget="9 bits",
               ladder=("FP8_BLOCK", "FP8_DYNAMIC"))  # fmt: skip
    job = placed(job_of(pair, scheme="FP8_BLOCK", budget="12 bits"))
    assert job.plan.layouts.quantization_config(job.plan.ignore)["quant_method"] == "fp8"
    assert {group.rung for group in job.placement.groups} == {"FP8_BLOCK", "16"}


def test_every_scheme_begins_a_ladder():
    assert list(LADDERS) == list(SCHEMES)
    assert all(ladder[0] == scheme for scheme, ladder in LADDERS.items())


def test_weights_whose_sizes_a_rung_cannot_hold_begin_higher(tmp_path):
    pair = tiny_models.make_pair(tmp_path, lambda: tiny_models.llama(intermediate_size=192))
    job = placed(job_of(pair, budget="7 bits"))
    found = {name: group for group in job.placement.groups for name in group.names}
    for layer in (0, 1):
        group = found[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert list(group.losses) == ["W4A16_G32", "FP8A16", "16"]
    assert any("W4A16 cannot hold, and begin higher" in note for note in job.placement.notes)
    with pytest.raises(CheckpointError, match="groups of 128; 2 weights"):
        job_of(pair)


def statistics(pair, outputs=True):
    generator = torch.Generator().manual_seed(0)

    def square(size):
        x = torch.randn(64, size, generator=generator) * torch.rand(size, generator=generator)
        return x.T @ x

    return {
        tensor.spec.name: Statistics(
            inputs=square(tensor.spec.shape[1]),
            outputs=square(tensor.spec.shape[0]) if outputs else None,
            tokens=64,
            source="run",
        )
        for tensor in job_of(pair).plan.quantized
    }


@pytest.mark.parametrize("outputs", [True, False])
def test_with_statistics_losses_are_those_of_the_curvature(pair, tmp_path, outputs):
    known = statistics(pair, outputs)
    placement = placed(job_of(pair, curvature=known, budget="6 bits")).placement
    assert placement.measure == ("curvature" if outputs else "inputs")
    export_checkpoint(pair[1], pair[0], tmp_path / "out", scheme="W4A16", search=QUICK)
    read, post = load_checkpoint(tmp_path / "out", torch.float32), load_checkpoint(pair[1])
    for group in placement.groups:
        expected = 0.0
        for name in group.names:
            error = read[name].double().numpy() - post[name].double().numpy()
            inputs = known[name].inputs.double().numpy()
            left = known[name].outputs.double().numpy() @ error if outputs else error
            expected += np.trace(left.T @ error @ inputs) / 64
        assert group.losses["W4A16"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_is_that_of_the_tokens_where_inputs_and_gradients_depend_on_each_other():
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(256, 128, generator=generator)
    post = base + 0.02 * torch.randn(256, 128, generator=generator)
    x, y = (torch.randn(512, size, generator=generator) for size in (128, 256))
    large = torch.rand(512, 1, generator=generator) < 0.1
    x, y = torch.where(large, 8 * x, x), torch.where(large, y / 8, y)  # large inputs have small gradients
    joint = float((x.square().sum(1) * y.square().sum(1)).sum())
    known = Statistics(inputs=x.T @ x, outputs=y.T @ y, tokens=512, source="run", joint=joint)
    settings = ExportSettings(scheme="W4A16", rounding="nearest", search=QUICK)
    names = ["layers.0.o_proj.weight"]
    job = prepare(Source.of({names[0]: post}), {names[0]: base}, settings, curvature={names[0]: known})
    [tensor] = job.plan.quantized
    found = losses_of(job, Pair(tensor, post, base), {"W4A16": job.plan.layout}, search_scales)["W4A16"]
    [result] = search_scales(job, [Pair(tensor, post, base)], QUICK)
    read = dequantize(result.codes, result.scale, job.plan.layout.granularity, torch.float32)
    error = read.double().numpy() - post.double().numpy()
    exact = np.square((x.double().numpy() @ error.T * y.double().numpy()).sum(1)).sum()
    assert found.curvature == pytest.approx(exact, rel=0.15)
    assert found.curvature / known.dependence > 4 * exact  # as if they had nothing to do with each other


def test_statistics_that_some_weights_lack_are_not_compared_with_others(pair):
    known = statistics(pair)
    left_out = next(iter(known))
    del known[left_out]
    placement = placed(job_of(pair, curvature=known, budget="6 bits")).placement
    assert placement.measure == "update"
    assert left_out in placement.notes[0]


@pytest.mark.parametrize("kind", ["update", "inputs", "curvature"])
def test_some_rows_of_a_large_weight_stand_for_all(kind):
    generator = torch.Generator().manual_seed(1)
    rows, cols = 2048 + 256, 128
    assert len(rows_of(rows)) == 4
    base = torch.randn(rows, cols, generator=generator)
    post = base + 0.02 * torch.randn(rows, cols, generator=generator)
    x, y = (torch.randn(512, size, generator=generator) for size in (cols, rows))
    y = y * (0.5 + torch.rand(rows, generator=generator))
    known = Statistics(inputs=x.T @ x, outputs=y.T @ y, tokens=512, source="run")
    names = ["layers.0.o_proj.weight"]
    settings = ExportSettings(scheme="W4A16", rounding="nearest", search=QUICK)
    job = prepare(
        Source.of({names[0]: post.bfloat16()}), {names[0]: base}, settings, curvature={names[0]: known}
    )
    [tensor] = job.plan.quantized
    whole = Pair(tensor, post, base)
    layouts = {"W4A16": job.plan.layout}
    sampled = getattr(losses_of(job, whole, layouts, search_scales)["W4A16"], kind)
    parts = [slice(start, start + 768) for start in range(0, rows, 768)]  # small enough to be looked at whole

    def part(rows):
        about = Statistics(inputs=known.inputs, outputs=known.outputs[rows, rows], tokens=512, source="run")
        one = dataclasses.replace(job, curvature={names[0]: about})
        found = losses_of(one, Pair(tensor, post[rows], base[rows]), layouts, search_scales)["W4A16"]
        return getattr(found, kind)

    exact = sum(map(part, parts)) / (len(parts) if kind == "update" else 1)
    assert sampled == pytest.approx(exact, rel=0.08)


def test_a_weight_without_a_base_is_compared_by_its_own_size(pair):
    base = dict(load_checkpoint(pair[0]).items())
    del base["model.layers.0.mlp.down_proj.weight"]
    settings = ExportSettings(
        scheme="W4A16", search=QUICK, rounding="nearest", missing_base="absmax", budget="6 bits"
    )
    placement = placed(prepare(Source.of(pair[1]), base, settings)).placement
    [group] = [one for one in placement.groups if "model.layers.0.mlp.down_proj.weight" in one.names]
    assert group.losses["W4A16"] < 0.05
    assert any(
        "1 weights without a base are compared by error over weight" in note for note in placement.notes
    )


def test_a_dry_run_measures_shows_the_choice_and_writes_nothing(pair, tmp_path, capsys):
    base, post = map(str, pair)
    command = ["quantize", post, "--base", base, "--out", str(tmp_path / "out"), "--budget", "6 bits"]
    command += ["--ladder", "W4A16", "FP8A16", "16", "--n-coarse", "2", "--n-fine", "1", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was written, all weights were measured" in shown
    assert "budget 6 bits: " in shown
    assert not (tmp_path / "out").exists()
    assert main([*command, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    report = ExportReport.load(tmp_path / "out")
    assert planned["placement"] == report.placement.to_dict()
    for name, rung in rungs(report).items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert ("16 bit" if rung == "16" else rung) in line
        assert "loss " in line


@pytest.mark.parametrize("budget", ["8 bits", 250_000])
def test_a_recipe_makes_the_same_bytes(exported, pair, tmp_path, monkeypatch, budget):
    out = Checkpoint(exported["W4A16"].path).path
    if budget != "8 bits":
        out = tmp_path / "out"
        export_checkpoint(pair[1], pair[0], out, scheme="MXFP4A16", search=QUICK, budget=budget)
    monkeypatch.chdir(out)
    assert main(["quantize", "--config", "recipe.yaml", "--quiet"]) == 0
    again = out.parent / "made-again"
    for file in out.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(again)


def test_a_weight_that_no_group_is_for_fails_verify(exported, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(exported["W4A16"].path, out)
    config = json.loads((out / "config.json").read_text())
    targets = config["quantization_config"]["config_groups"]["group_0"]["targets"]
    lost = targets.pop()
    (out / "config.json").write_text(json.dumps(config))
    assert any(f"{lost}.weight is quantized, but no config group is for it" in problem
               for problem in verify_checkpoint(out))  # fmt: skip
    config["quantization_config"]["config_groups"]["group_1"]["targets"].append(lost)
    (out / "config.json").write_text(json.dumps(config))
    assert any(f"{lost}.weight" in problem for problem in verify_checkpoint(out))
