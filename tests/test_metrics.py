"""The metrics are the numpy definitions, over any split into batches, halves or ranks, and survive every
cast."""

import math
import pickle
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity
from torchmetrics import MetricCollection

from daq_lightning import metrics as module
from daq_lightning.metrics import (
    DeltaCosineSimilarity,
    DeltaGain,
    DeltaMeanSquaredError,
    DeltaNoise,
    DeltaNorm,
    PreservationByMagnitude,
    SignPreservationRate,
    delta_metrics,
)
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.objectives import DeltaStats, measure
from daq_lightning.numerics.search.search import search_scale

CLASSES = [
    SignPreservationRate,
    DeltaCosineSimilarity,
    DeltaGain,
    DeltaMeanSquaredError,
    DeltaNorm,
    DeltaNoise,
]
KEYS = dict(zip(("sign_rate", "cosine", "gain", "mse", "norm", "noise"), CLASSES, strict=True))


def case(rows=12, seed=0):
    """(quantized, weight, base), with unchanged, lost and flipped elements."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 10, generator=generator)
    weight = base + 0.1 * torch.randn(rows, 10, generator=generator) * (
        torch.rand(rows, 10, generator=generator) < 0.7
    )
    return (weight * 16).round() / 16, weight, base


def oracle(quantized, weight, base):
    """scikit-learn and numpy in float64, on the float32 differences."""
    delta, delta_q = ((tensor - base).double().numpy().ravel() for tensor in (weight, quantized))
    return {
        SignPreservationRate: accuracy_score(np.sign(delta), np.sign(delta_q)),
        DeltaCosineSimilarity: cosine_similarity([delta], [delta_q])[0, 0],
        DeltaGain: np.linalg.lstsq(delta[:, None], delta_q)[0][0],  # slope of the line through zero
        DeltaMeanSquaredError: mean_squared_error(
            weight.double().numpy().ravel(), quantized.double().numpy().ravel()
        ),
        DeltaNorm: np.linalg.norm(delta),
        DeltaNoise: np.mean((delta == 0) & (delta_q != 0)),
    }


def thirds(tensors):
    return [tuple(tensor[rows] for tensor in tensors) for rows in (slice(0, 3), slice(3, 4), slice(4, None))]


@pytest.mark.parametrize("kind", CLASSES)
def test_values_are_those_of_the_definition_over_all_batches(kind):
    tensors = case()
    metric = kind()
    for batch in thirds(tensors):
        metric.update(*batch)
    value = metric.compute()
    assert (value.shape, value.dtype) == ((), torch.float64)
    assert float(value) == pytest.approx(oracle(*tensors)[kind], rel=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_forward_gives_the_batch_and_keeps_the_whole(kind):
    tensors = case()
    metric = kind()
    for batch in thirds(tensors):
        assert float(metric(*batch)) == pytest.approx(oracle(*batch)[kind], rel=1e-12)
    assert float(metric.compute()) == pytest.approx(oracle(*tensors)[kind], rel=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_sums_of_any_shape_count_as_the_tensors_they_were_taken_from(kind):
    parts = [measure(weight, base, quantized) for quantized, weight, base in thirds(case())]
    stacked = DeltaStats(*(torch.stack(fields) for fields in zip(*parts, strict=True)))
    expected = oracle(*case())[kind]
    one_by_one, at_once, as_column = kind(), kind(), kind()
    for part in parts:
        one_by_one.update(part)
    at_once.update(stacked)
    as_column.update(stacked.map(lambda field: field[:, None]))
    for metric in (one_by_one, at_once, as_column):
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


def test_the_sums_of_a_search_are_taken_as_they_are():
    _, weight, base = case(rows=30)
    result = search_scale(weight, base, PerBlock(8, 8))
    metric = SignPreservationRate()
    metric.update(result.stats)
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(metric.stats, result.stats.total(), strict=True)
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_two_halves_merge_into_the_whole(kind):
    tensors = case()
    first, second = kind(), kind()
    first.update(*(tensor[:5] for tensor in tensors))
    second.update(*(tensor[5:] for tensor in tensors))
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(oracle(*tensors)[kind], rel=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_reset_forgets(kind):
    metric = kind()
    metric.update(*case(seed=1))
    metric.reset()
    metric.update(*case(seed=2))
    assert float(metric.compute()) == pytest.approx(oracle(*case(seed=2))[kind], rel=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_without_an_element_the_value_is_nan(kind):
    metric = kind()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert math.isnan(metric.compute())
    metric.update(torch.ones(0, 3), torch.ones(0, 3), torch.ones(0, 3))
    assert math.isnan(metric.compute())


def test_a_weight_that_did_not_change_has_defined_values():
    metrics = delta_metrics()
    metrics.update(torch.ones(3), torch.ones(3), torch.ones(3))
    assert {key: float(value) for key, value in metrics.compute().items()} == {
        "sign_rate": 1.0,
        "cosine": 1.0,
        "gain": 1.0,
        "mse": 0.0,
        "norm": 0.0,
        "noise": 0.0,
    }


# --- collection ---


def test_the_collection_updates_shared_sums_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module.objectives, "measure", lambda *tensors: calls.append(0) or measure(*tensors))
    metrics = delta_metrics()
    for count, batch in enumerate(thirds(case()), start=1):
        metrics.update(*batch)
        assert len(calls) == count
    expected = oracle(*case())
    values = metrics.compute()
    assert sorted(values) == sorted(KEYS)
    for key, kind in KEYS.items():
        assert float(values[key]) == pytest.approx(expected[kind], rel=1e-12)
    metrics.reset()
    metrics.update(*case(seed=3))
    assert float(metrics.compute()["gain"]) == pytest.approx(oracle(*case(seed=3))[DeltaGain], rel=1e-12)


def test_torchmetrics_finds_the_shared_sums_by_itself():
    metrics = MetricCollection([kind() for kind in CLASSES])
    for batch in thirds(case()):
        metrics.update(*batch)
    assert len(metrics.compute_groups) == 1
    expected = oracle(*case())
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {kind.__name__: expected[kind] for kind in CLASSES}, rel=1e-12
    )


def test_the_collection_forwards_batches_and_takes_sums():
    metrics = delta_metrics(prefix="daq/")
    for quantized, weight, base in thirds(case()):
        expected = oracle(quantized, weight, base)
        for key, value in metrics(measure(weight, base, quantized)).items():
            assert float(value) == pytest.approx(expected[KEYS[key.removeprefix("daq/")]], rel=1e-12)
    assert float(metrics.compute()["daq/mse"]) == pytest.approx(
        oracle(*case())[DeltaMeanSquaredError], rel=1e-12
    )


# --- shares, reductions, bins ---


def test_noise_flips_and_losses_are_what_the_sign_rate_lacks():
    metrics = delta_metrics()
    metrics.update(*case())
    stats, values = metrics["gain"].stats, metrics.compute()
    rest = values["sign_rate"] + values["noise"] + (stats.flipped + stats.lost).double() / stats.n
    assert float(rest) == pytest.approx(1, abs=1e-15)
    assert float(values["noise"]) > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_the_mean_over_tensors_weighs_small_and_large_alike(kind):
    metric = kind(reduction="tensor_mean")
    batches = thirds(case())
    for batch in batches:
        metric.update(*batch)
    mean = np.mean([oracle(*batch)[kind] for batch in batches])
    assert float(metric.compute()) == pytest.approx(mean, rel=1e-12)
    assert float(metric.compute()) != pytest.approx(oracle(*case())[kind], rel=1e-6)  # the pooled value
    first, second = (kind(reduction="tensor_mean") for _ in range(2))
    first(*batches[0])
    for batch in batches[1:]:
        second(*batch)
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(mean, rel=1e-12)


def test_the_mean_over_tensors_leaves_out_tensors_without_a_value():
    metrics = delta_metrics(reduction="tensor_mean")
    metrics.update(torch.tensor([1.5]), torch.tensor([2.0]), torch.tensor([1.0]))
    metrics.update(torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([1.0]))  # gain of nothing: NaN
    assert float(metrics.compute()["gain"]) == 0.5
    assert float(metrics.compute()["sign_rate"]) == 0.5
    with pytest.raises(ValueError, match='"pooled" or "tensor_mean", got \'mean\''):
        DeltaGain(reduction="mean")


def test_preservation_by_magnitude_counts_what_numpy_counts():
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(400)
    weight = 10 ** (-6 + 4 * torch.rand(400, generator=generator)) * torch.randn(400, generator=generator)
    weight[:40] = 0
    weight[40:43] = torch.tensor([1e-5, -1e-4, 1e-3])  # on the edges, as float32 has them
    quantized = (weight * 2**13).round() / 2**13 + 1e-3 * (torch.rand(400, generator=generator) < 0.1)
    metric = PreservationByMagnitude()
    for rows in (slice(0, 100), slice(100, None)):
        metric.update(quantized[rows], weight[rows], base[rows])
    size = np.abs(weight.numpy())
    kept = np.sign(weight.numpy()) == np.sign(quantized.numpy())
    bins = [size == 0] + [
        (size > 0) & (size >= np.float32(low)) & (size < np.float32(high))
        for low, high in [(0, 1e-5), (1e-5, 1e-4), (1e-4, 1e-3), (1e-3, np.inf)]
    ]
    values = metric.compute()
    assert list(values) == [
        "preserved_unchanged",
        "preserved_below_1e-5",
        "preserved_1e-5_to_1e-4",
        "preserved_1e-4_to_1e-3",
        "preserved_from_1e-3",
    ]
    assert [float(value) for value in values.values()] == [kept[chosen].mean() for chosen in bins]
    whole = measure(weight, base, quantized)
    assert (int(metric.stats.n.sum()), int(metric.stats.preserved.sum())) == (400, int(whole.sign_equal))
    metric.reset()
    metric.update(torch.ones(1), torch.ones(1), torch.zeros(1))
    assert [math.isnan(value) for value in metric.compute().values()] == [True] * 4 + [False]


# --- casts, copies, devices ---


@pytest.mark.parametrize(
    "cast",
    [
        lambda metric: metric.set_dtype(torch.float16),
        lambda metric: metric.half(),
        lambda metric: metric.to(torch.float16),
        lambda metric: metric.to("cpu", torch.bfloat16),
        lambda metric: torch.nn.ModuleList([metric]).half()[0],
        lambda metric: torch.nn.ModuleList([metric]).to(torch.bfloat16)[0],
    ],
    ids=["set_dtype", "half", "to", "to_device", "module_half", "module_to"],
)
def test_no_cast_touches_counts_or_sums(cast):
    metric = cast(SignPreservationRate())
    assert [state.dtype for state in metric.stats] == [torch.int64] * 6 + [torch.float64] * 4
    many = measure(torch.ones(70001), torch.zeros(70001), torch.ones(70001))  # more than float16 can count
    metric.update(many)
    metric = cast(metric)
    assert [state.dtype for state in metric.stats] == [torch.int64] * 6 + [torch.float64] * 4
    assert int(metric.stats.n) == 70001
    assert float(metric.stats.delta_sq) == 70001.0
    metric.reset()
    assert [state.dtype for state in metric.stats] == [torch.int64] * 6 + [torch.float64] * 4


def test_counts_go_on_beyond_what_float32_counts():
    one = measure(torch.ones(1), torch.zeros(1), torch.ones(1))
    metric = DeltaGain()
    metric.update(one.map(lambda field: field * 2**24))
    metric.update(one)
    assert int(metric.stats.n) == 2**24 + 1


def test_states_move_between_devices():
    metric = SignPreservationRate().to("meta")
    assert {state.device.type for state in metric.stats} == {"meta"}
    assert metric.stats.n.dtype == torch.int64


@pytest.mark.parametrize("kind", CLASSES)
def test_copies_are_independent(kind):
    metric = kind()
    metric.update(*case(seed=1))
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(copy.compute(), metric.compute())
        copy.update(*case(seed=2))
        assert int(copy.stats.n) == 2 * int(metric.stats.n)


def test_a_checkpoint_holds_the_sums_when_asked_to():
    metric, fresh = DeltaGain(), DeltaGain()
    for each in (metric, fresh):
        each.persistent(True)
    metric.update(*case())
    fresh.load_state_dict(metric.state_dict())
    assert all(torch.equal(*pair) for pair in zip(metric.stats, fresh.stats, strict=True))


@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_inputs_are_measured_in_float32(kind):
    tensors = tuple(tensor.bfloat16() for tensor in case())
    metric = kind()
    metric.update(*tensors)
    assert float(metric.compute()) == pytest.approx(
        oracle(*(tensor.float() for tensor in tensors))[kind], rel=1e-12
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_flow_exactly_where_the_flag_says(kind):
    quantized, weight, base = case()
    quantized.requires_grad_()
    metric = kind()
    value = metric(quantized, weight, base)
    assert value.requires_grad is kind.is_differentiable
    assert not metric.compute().requires_grad
    if kind.is_differentiable:
        (gradient,) = torch.autograd.grad(value, quantized)
        step = torch.zeros_like(base)
        step[2, 3] = 2.0**-11
        up, down = (oracle((quantized + sign * step).detach(), weight, base)[kind] for sign in (1, -1))
        assert float(gradient[2, 3]) == pytest.approx((up - down) / 2.0**-10, rel=1e-3)


# --- contract ---


def test_the_flags_of_the_contract():
    assert [kind.higher_is_better for kind in CLASSES] == [True, True, None, False, None, False]
    assert [kind.full_state_update for kind in CLASSES] == [False] * 6
    bounds = [(kind.plot_lower_bound, kind.plot_upper_bound) for kind in CLASSES]
    assert bounds == [(0.0, 1.0), (-1.0, 1.0), (None, None), (0.0, None), (0.0, None), (0.0, 1.0)]


def test_a_clean_run_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = delta_metrics()
        for batch in thirds(case()):
            metrics(*batch)
        metrics.compute()
        metrics.reset()


def test_other_arguments_are_refused_with_what_came():
    metric = SignPreservationRate()
    quantized, weight, base = case()
    with pytest.raises(TypeError, match=r"got \(Tensor, Tensor, NoneType\)"):
        metric.update(quantized, weight)
    with pytest.raises(TypeError, match=r"got \(DeltaStats, Tensor, Tensor\)"):
        metric.update(measure(weight, base, quantized), weight, base)
    with pytest.raises(TypeError, match=r"got \(tuple, NoneType, NoneType\)"):
        metric.update((quantized, weight, base))
    with pytest.raises(ValueError, match="one shape"):
        metric.update(quantized, weight, base[:1])


@pytest.mark.parametrize("kind", CLASSES)
def test_plots_one_value_or_a_line(kind):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = kind()
    values = [metric(*batch) for batch in thirds(case())]
    for given in (None, values):
        figure, axis = metric.plot(given)
        assert axis is not None
        plt.close(figure)


# --- ranks ---


def on_rank(rank, rendezvous, expected):
    """One of two processes: sees its share of the rows, and computes the value of all of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        rows = slice(0, 5) if rank == 0 else slice(5, None)
        share = tuple(tensor[rows] for tensor in case())
        metrics = delta_metrics()
        metrics.update(*share)
        for key, value in metrics.compute().items():
            assert abs(float(value) - expected[key]) <= 1e-12 * abs(expected[key]), (
                key,
                float(value),
                expected[key],
            )
        assert (
            int(metrics["gain"].stats.n) == share[0].numel()
        )  # its own sums again, after the synchronization
        alone = SignPreservationRate()
        if rank == 0:
            alone.update(*case())  # the other rank has seen nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert float(alone.compute()) == expected["sign_rate"]
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_sum_their_shares(tmp_path):
    values = oracle(*case())
    expected = {key: float(values[kind]) for key, kind in KEYS.items()}
    method = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import everything again
    context = torch.multiprocessing.start_processes(
        on_rank, (str(tmp_path / "rendezvous"), expected), nprocs=2, join=False, start_method=method
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):  # raises what a rank raised
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
