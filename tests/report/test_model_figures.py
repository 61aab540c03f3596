"""The figures of a model keep torchmetrics' conventions, count 1e9 tokens, and are the same on two ranks."""

import math
import pickle
import sys
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torchmetrics import MetricCollection

from daq_lightning import delta_metrics, model_metrics
from daq_lightning.numerics import divergence
from daq_lightning.numerics.divergence import DivergenceStats, compare_logits
from daq_lightning.numerics.retention import compare_update, update_retention
from daq_lightning.report import model_figures as module
from daq_lightning.report.model_figures import (
    AnswerFlips,
    KLDivergenceToReference,
    PerplexityRatio,
    TopTokenAgreement,
    TrueTokenDeltaP,
    UpdateRetention,
)

TWINS = {
    KLDivergenceToReference: divergence.kl_divergence_to_reference,
    PerplexityRatio: divergence.perplexity_ratio,
    TrueTokenDeltaP: divergence.true_token_delta_p,
    TopTokenAgreement: divergence.top_token_agreement,
    AnswerFlips: divergence.answer_flips,
    UpdateRetention: update_retention,
}
"""Class -> its function of sums; the functions are held to NumPy and llama.cpp in tests/numerics."""
HIGHER_IS_BETTER = dict(zip(TWINS, (False, False, None, True, False, None), strict=True))
CLASSES = pytest.mark.parametrize("kind", TWINS)


def case(tokens=120, seed=0, kind=UpdateRetention):
    """Keyword arguments of `update`."""
    generator = torch.Generator().manual_seed(seed)
    base = 2 * torch.randn(tokens, 17, generator=generator)
    reference = base + 0.5 * torch.randn(tokens, 17, generator=generator)
    logits = reference + 0.2 * torch.randn(tokens, 17, generator=generator)
    target = torch.randint(17, (tokens,), generator=generator)
    models = {"logits": logits, "reference_logits": reference, "base_logits": base, "target": target}
    return {name: given for name, given in models.items() if kind is UpdateRetention or name != "base_logits"}


def parts(arguments, *rows):
    return [{name: given[chosen] for name, given in arguments.items()} for chosen in rows]


def twin(kind, arguments):
    stats = (compare_update if kind is UpdateRetention else compare_logits)(**arguments)
    return {key: float(value) for key, value in TWINS[kind](stats)._asdict().items()}


def values(metric):
    return {key: float(value) for key, value in metric.compute().items()}


THIRDS = (slice(0, 30), slice(30, 31), slice(31, None))


@CLASSES
def test_values_are_those_of_the_function_over_all_batches(kind):
    arguments = case(kind=kind)
    metric = kind()
    for batch in parts(arguments, *THIRDS):
        alone = {key: float(value) for key, value in metric(**batch).items()}
        assert alone == pytest.approx(twin(kind, batch), rel=1e-12, nan_ok=True)
    found = metric.compute()
    assert {(value.dtype, value.shape) for value in found.values()} == {(torch.float64, ())}
    assert values(metric) == pytest.approx(twin(kind, arguments), rel=1e-12)


@CLASSES
def test_halves_merge_reset_forgets_and_copies_are_independent(kind):
    arguments = case(kind=kind)
    first, second = kind(), kind()
    for metric, batch in zip((first, second), parts(arguments, slice(0, 50), slice(50, None)), strict=True):
        metric.update(**batch)
    first.merge_state(second)
    assert values(first) == pytest.approx(twin(kind, arguments), rel=1e-12)
    for copy in (first.clone(), pickle.loads(pickle.dumps(first))):
        assert values(copy) == values(first)
        copy.update(**case(seed=2, kind=kind))
        assert int(copy.stats.n) == 2 * int(first.stats.n)
    first.reset()
    first.update(**case(seed=1, kind=kind))
    assert values(first) == twin(kind, case(seed=1, kind=kind))


@CLASSES
def test_a_checkpoint_holds_the_sums_when_asked_to(kind):
    metric, fresh = kind(), kind()
    assert not metric.state_dict()
    for each in (metric, fresh):
        each.persistent(True)
    metric.update(**case(kind=kind))
    fresh.load_state_dict(metric.state_dict())
    fresh.update(**parts(case(kind=kind), slice(0, 0))[0])
    assert values(fresh) == twin(kind, case(kind=kind))


@CLASSES
def test_no_cast_touches_counts_or_sums_and_states_move(kind):
    metric = kind()
    dtypes = [state.dtype for state in metric.stats]
    assert set(dtypes) == {torch.int64, torch.float64}
    metric.update(**case(kind=kind))
    for cast in (lambda m: m.half(), lambda m: m.set_dtype(torch.float16), lambda m: m.to(torch.bfloat16)):
        metric = torch.nn.ModuleList([cast(metric)]).half()[0]
        assert [state.dtype for state in metric.stats] == dtypes
    assert values(metric) == twin(kind, case(kind=kind))
    assert {state.device.type for state in metric.to("meta").stats} == {"meta"}


@CLASSES
def test_the_contract(kind):
    metric = kind()
    arguments = case(kind=kind)
    arguments["logits"].requires_grad_()
    assert not any(value.requires_grad for value in metric(**arguments).values())
    assert (kind.is_differentiable, kind.full_state_update) == (False, False)
    assert kind.higher_is_better is HIGHER_IS_BETTER[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = kind()
        fresh.update(**case(kind=kind))
        fresh.compute()
    with pytest.raises(ValueError, match="one shape"):
        metric.update(**arguments | {"logits": arguments["logits"][:3]})
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(map(math.isnan, kind().compute().values()))


@CLASSES
def test_plots_one_table_or_lines_over_steps(kind):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = kind()
    steps = [metric(**batch) for batch in parts(case(kind=kind), *THIRDS)]
    for given in (None, steps[0], steps):
        figure, axis = metric.plot(given)
        assert len(axis.get_legend_handles_labels()[1]) == len(steps[0])
        plt.close(figure)


# --- collection ---


@pytest.mark.parametrize("base", [False, True])
def test_the_collection_looks_at_the_logits_once_a_kind(base, monkeypatch):
    calls = []
    for name, function in (("compare_logits", compare_logits), ("compare_update", compare_update)):
        place = divergence if name == "compare_logits" else module

        def spy(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(place, name, spy)
    metrics = model_metrics(prefix="val/", base=base)
    for batch in parts(case(), *THIRDS):
        metrics.update(**batch)
    assert calls == (["compare_logits", "compare_update"] if base else ["compare_logits"]) * 3
    expected = {}
    for kind in TWINS:
        if base or kind is not UpdateRetention:
            expected |= twin(kind, case(kind=kind))
    found = {key: float(value) for key, value in metrics.compute().items()}
    assert found == pytest.approx({f"val/{key}": value for key, value in expected.items()}, rel=1e-12)
    metrics.reset()
    batch = {key: float(value) for key, value in metrics(**case(seed=3)).items()}
    for key, value in twin(KLDivergenceToReference, case(seed=3, kind=None)).items():
        assert batch[f"val/{key}"] == pytest.approx(value, rel=1e-12)


def test_torchmetrics_finds_the_shared_sums_by_itself():
    metrics = MetricCollection([kind() for kind in TWINS])
    for batch in parts(case(), *THIRDS):
        metrics.update(**batch)
    assert sorted(map(len, metrics.compute_groups.values())) == [1, 5]


# --- a thousand million tokens ---


def test_sums_over_3e9_tokens_are_exact_to_twelve_digits():
    # 3000 batches of 1e6 tokens each, as their sums; beside them exact fractions
    random = np.random.default_rng(0)
    metric, exact = KLDivergenceToReference(), {"kld": Fraction(0), "kld_sq": Fraction(0)}
    metric.update(torch.ones(0, 2), torch.ones(0, 2))
    zero = DivergenceStats.zero(torch.device("cpu"))
    bins = torch.bincount(torch.tensor([5000, 6000]), minlength=len(zero.kld_bins)) * 500_000
    for kld in 1e6 * random.lognormal(-7, 1, 3000):
        batch = {"kld": kld, "kld_sq": 3e-6 * kld**2}
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in batch.items()}
        metric.merge_state(zero._replace(n=torch.tensor(1_000_000), kld_bins=bins, **sums)._asdict())
        exact = {name: total + Fraction(batch[name]) for name, total in exact.items()}
    n = 3_000_000_000
    mean = exact["kld"] / n
    error = math.sqrt((exact["kld_sq"] / n - mean**2) / (n - 1))
    assert int(metric.stats.n) == n > 2**31
    assert metric.stats.kld_bins[5000] == n / 2
    found = metric.compute()
    assert float(found["kld_mean"]) == pytest.approx(float(mean), rel=1e-12)
    assert float(found["kld_mean_error"]) == pytest.approx(error, rel=1e-11)


@pytest.mark.slow
def test_a_running_float64_sum_of_1e9_tokens_keeps_ten_digits():
    # token by token, the worst there is: metrics add whole batches. The sum runs through 100 rounds of 1e7.
    block = np.random.default_rng(0).lognormal(-7, 2, 10**7)
    total = 0.0
    for _ in range(100):
        total = np.add.accumulate(np.concatenate([[total], block]))[-1]
    assert total == pytest.approx(100 * math.fsum(block), rel=1e-10)


# --- ranks ---


COUNTED = (
    "top_",
    "same_top",
    "flip",
    "kld_median",
    "kld_p99",
    "kld_max",
    "preserved",
    "pooled/sign_rate",
    "pooled/noise",
)


def on_rank(rank, rendezvous, whole):
    """One of two processes: sees its share of the tokens and tensors, and computes the values of all."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        share, rows = parts(case(), slice(0, 33), slice(33, None))[rank], (33, 87)[rank]
        metrics, weights = everything()
        metrics.update(**share)
        for tensors in weight_batches()[rank::2]:
            for metric in weights:
                metric.update(*tensors)
        found = results(metrics, weights)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            counted = key.startswith(COUNTED)  # from counts alone: not a bit may differ
            assert abs(found[key] - value) <= (0 if counted else 1e-12 * abs(value)), (key, found[key], value)
        # its own sums again, after the synchronization
        assert int(metrics["UpdateRetention"].stats.n) == rows
    finally:
        torch.distributed.destroy_process_group()


def everything():
    from daq_lightning import PreservationByMagnitude

    return model_metrics(base=True), [
        delta_metrics(prefix="pooled/"),
        delta_metrics(prefix="mean/", reduction="tensor_mean"),
        PreservationByMagnitude(),
    ]


def weight_batches():
    generator = torch.Generator().manual_seed(1)
    bases = [torch.randn(rows, 8, generator=generator) for rows in (3, 11, 5)]
    weights = [base + 10 ** (-6 * torch.rand(base.shape, generator=generator)) for base in bases]
    for weight, base in zip(weights, bases, strict=True):
        weight[0] = base[0]
        base[1, :2] = torch.tensor([1e-5, 0.0])
        weight[1, :2] = torch.tensor([1.5e-5, 2e-5])  # below 1e-5, and above
    return [((weight * 64).round() / 64, weight, base) for weight, base in zip(weights, bases, strict=True)]


def results(metrics, weights):
    return {key: float(value) for metric in (metrics, *weights) for key, value in metric.compute().items()}


@pytest.mark.slow
def test_two_ranks_give_the_totals_of_one(tmp_path):
    metrics, weights = everything()
    metrics.update(**case())
    for tensors in weight_batches():
        for metric in weights:
            metric.update(*tensors)
    method = "fork" if sys.platform == "linux" else "spawn"
    context = torch.multiprocessing.start_processes(
        on_rank,
        (str(tmp_path / "rendezvous"), results(metrics, weights)),
        nprocs=2,
        join=False,
        start_method=method,
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):  # raises what a rank raised
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
