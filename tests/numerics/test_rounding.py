"""Rounding with curvature against its definition in NumPy, against GPTQ, and against nearest rounding."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from outside_formats import FORMATS, held, rounded

from daq_lightning.numerics.backends import cpu, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4_ASYM
from daq_lightning.numerics.quantize import absmax_scale, dequantize, min_max_scale, quantize
from daq_lightning.numerics.rounding import definition, triangular
from daq_lightning.numerics.rounding.curvature import Factor, factor, factor_sides, mix, update_statistics
from daq_lightning.numerics.rounding.loss import nearest_loss
from daq_lightning.numerics.rounding.rounding import round_with_curvature
from daq_lightning.numerics.rounding.settings import RoundingSettings
from daq_lightning.numerics.rounding.walk import RoundingTask, identity

WALKS = {"definition": definition.walk, "blocked": reference.walk, "cpu": cpu.walk}
WALK = pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
GRANULARITIES = [PerChannel(), PerBlock(16, 8), PerBlock(1, 16), PerTensor()]
SIDES = {"both": (True, True), "inputs": (True, False), "outputs": (False, True), "none": (False, False)}


def bits(codes):
    return codes.contiguous().view(torch.uint8)


def problem(shape=(20, 33), seed=0, tokens=17, dtype=torch.float32):
    """A weight, its update, and statistics of fewer tokens than channels, of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    weight = torch.randn(m, n, generator=generator).to(dtype)
    delta = 0.01 * torch.randn(m, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator) * 3
    y = torch.randn(tokens, m, generator=generator) * torch.rand(m, generator=generator)
    return weight, delta, x.T @ x, y.T @ y


def task_of(weight, granularity, inputs, outputs, fmt=FP8_E4M3):
    return RoundingTask(
        weight=weight,
        scale=absmax_scale(weight, granularity, fmt=fmt),
        granularity=granularity,
        format=fmt,
        inputs=inputs,
        outputs=outputs,
    )


def cell_of(granularity, shape):
    """Rows and columns that share a scale, without asking the granularity."""
    if isinstance(granularity, PerBlock):
        return granularity.rows, granularity.cols
    return (1, shape[1]) if isinstance(granularity, PerChannel) else shape


def mixed_in_numpy(statistics, update, share, damping):
    h, u = statistics.double().numpy(), update.double().numpy()
    mixed = h / np.mean(np.diag(h)) + share * u / np.mean(np.diag(u))
    return mixed + damping * np.eye(len(h))


def definition_in_numpy(weight, scale, cell, h_in, h_out, fmt, outside, order=True, zero=None):
    """Section 5 of the method, element by element, in float64; H = A D A^T by NumPy's Cholesky, flipped."""

    def side(h):
        places = np.argsort(-np.diag(h), kind="stable") if order else np.arange(len(h))
        upper = np.linalg.cholesky(h[np.ix_(places, places)][::-1, ::-1])[::-1, ::-1]
        return places, upper / np.diag(upper)

    (columns, a_in), (rows, a_out) = side(h_in), side(h_out)
    w, s = weight.float().numpy().astype(np.float64), scale.numpy()
    m, n = w.shape
    error, moved = np.zeros((m, n)), np.zeros((m, n))
    codes, read = np.zeros((m, n), np.float32), np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            place = rows[i], columns[j]
            r = sum(error[i, k] * a_in[k, j] for k in range(j))
            c = sum(moved[k, j] * a_out[k, i] for k in range(i))
            one_scale = s[place[0] // cell[0], place[1] // cell[1]]
            scaled = np.float32(w[place] + r + c) * (np.float32(1) / one_scale)
            if zero is None:
                codes[place] = rounded(scaled, fmt, outside)
                read[place] = codes[place] * one_scale
            else:
                z = np.float32(zero.numpy()[place[0] // cell[0], place[1] // cell[1]])
                codes[place] = np.rint(np.clip(scaled, -8 - z, 7 - z)) + z
                read[place] = (codes[place] - z) * one_scale
            error[i, j] = w[place] - read[place]
            moved[i, j] = error[i, j] + r
    return held(codes, fmt), np.trace((read - w).T @ h_out @ (read - w) @ h_in)


@WALK
@pytest.mark.parametrize(("fmt", "outside"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 1), (20, 33)], ids=str)
def test_codes_and_loss_are_those_of_the_definition_in_numpy(walk, fmt, outside, granularity, shape):
    weight, delta, a, g = problem(shape)
    settings = RoundingSettings()
    sides = factor_sides(settings, inputs_NN=a, outputs_MM=g, delta_MN=delta)
    task = task_of(weight, granularity, sides.inputs, sides.outputs, fmt)
    u_in, u_out = update_statistics(delta)
    codes, loss = definition_in_numpy(
        weight,
        task.scale,
        cell_of(granularity, shape),
        mixed_in_numpy(a, u_in, 0.1, 0.001),
        mixed_in_numpy(g, u_out, 0.1, 0.01),
        fmt,
        outside,
    )
    walked = walk(task)
    assert walked.codes.dtype == fmt.dtype
    assert np.array_equal(bits(walked.codes).numpy(), codes)
    assert float(walked.loss) == pytest.approx(loss, rel=1e-4, abs=1e-12)


@WALK
@pytest.mark.parametrize("granularity", [PerBlock(1, 16), PerChannel()], ids=str)
def test_codes_with_zero_points_are_those_of_the_definition_in_numpy(walk, granularity):
    weight, delta, a, g = problem()
    weight += torch.linspace(-2, 2, 20)[:, None]  # rows of one sign, and of both
    scale, zero = min_max_scale(weight, granularity, fmt=INT4_ASYM)
    sides = factor_sides(inputs_NN=a, outputs_MM=g, delta_MN=delta)
    task = dataclasses.replace(task_of(weight, granularity, *sides, INT4_ASYM), scale=scale, zero=zero)
    u_in, u_out = update_statistics(delta)
    hessians = mixed_in_numpy(a, u_in, 0.1, 0.001), mixed_in_numpy(g, u_out, 0.1, 0.01)
    cell = cell_of(granularity, task.shape)
    codes, loss = definition_in_numpy(weight, scale, cell, *hessians, INT4_ASYM, np.int8, zero=zero)
    walked = walk(task)
    assert np.array_equal(bits(walked.codes).numpy(), codes)
    assert walked.loss == pytest.approx(loss, rel=1e-4)
    read = dequantize(quantize(weight, scale, granularity, INT4_ASYM, zero), scale, granularity, zero=zero)
    error = (read - weight).double().numpy()
    nearest = np.trace(error.T @ hessians[1] @ error @ hessians[0])
    assert walked.nearest_loss == pytest.approx(nearest, rel=1e-3)
    result = round_with_curvature(
        weight, scale, granularity, inputs=sides.inputs, outputs=sides.outputs, fmt=INT4_ASYM, zero=zero
    )
    assert not result.kept_nearest
    for wrong in (None, zero[:1]):
        with pytest.raises(ValueError, match="zero point of the shape of the scale"):
            round_with_curvature(weight, scale, granularity, inputs=sides.inputs, fmt=INT4_ASYM, zero=wrong)
    with pytest.raises(ValueError, match="zero point of the shape of the scale"):
        round_with_curvature(weight, scale, granularity, inputs=sides.inputs, zero=zero)


@WALK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_16_bit_and_with_any_strides(walk, dtype):
    weight, _, a, g = problem(dtype=dtype)
    sides = factor_sides(inputs_NN=a, outputs_MM=g)
    expected = definition.walk(task_of(weight.float(), PerBlock(16, 8), *sides))
    for given in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :33]):
        walked = walk(task_of(given, PerBlock(16, 8), *sides))
        assert torch.equal(bits(walked.codes), bits(expected.codes))


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("shape", [(70, 150), (129, 66)], ids=str)
def test_the_blocked_forms_give_the_codes_of_the_definition_across_tiles(sides, shape):
    weight, _, a, g = problem(shape, tokens=60)
    factors = factor_sides(inputs_NN=a if sides[0] else None, outputs_MM=g if sides[1] else None)
    task = task_of(weight, PerBlock(32, 48), *factors)
    expected = definition.walk(task)
    for walk in (reference.walk, cpu.walk):
        walked = walk(task)
        assert torch.equal(bits(walked.codes), bits(expected.codes))
        assert walked.loss == pytest.approx(expected.loss, rel=1e-5)
        assert walked.nearest_loss == pytest.approx(expected.nearest_loss, rel=1e-5)
    if sides == (False, False):
        assert torch.equal(bits(expected.codes), bits(quantize(weight, task.scale, task.granularity)))


@pytest.mark.parametrize("walk", [reference.walk, cpu.walk], ids=["blocked", "cpu"])
def test_across_many_blocks_the_loss_is_that_of_the_codes(walk):
    """In float32 a tie may break the other way; from there on codes differ, but the sums are still true."""
    weight, _, a, g = problem((300, 520), tokens=200)
    task = task_of(weight, PerChannel(), *factor_sides(inputs_NN=a, outputs_MM=g))
    walked = walk(task)
    h_in, h_out = (mixed_in_numpy(h, torch.eye(len(h)), 0, d) for h, d in ((a, 0.001), (g, 0.01)))
    assert walked.loss == pytest.approx(
        loss_in_numpy(weight, walked.codes, task.scale, h_in, h_out), rel=1e-4
    )


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("sides", [(True, True), (True, False)], ids=["both", "inputs"])
def test_nearest_is_measured_as_far_as_it_takes(tokens, sides):
    """A part of its loss, never more than all of it, where that is more than the loss of the codes."""
    weight, _, a, g = problem((150, 1300), tokens=tokens)
    inputs, outputs = factor_sides(inputs_NN=a, outputs_MM=g if sides[1] else None)
    task = task_of(weight, PerChannel(), inputs, outputs)
    walked, true = cpu.walk(task), nearest_loss(task, torch.float64)
    assert walked.nearest_loss * walked.nearest_measured <= true * 1.0001
    assert walked.nearest_loss * walked.nearest_measured > walked.loss
    assert walked.nearest_measured == 1 / 8
    assert walked.nearest_loss == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_nearest_is_measured_in_full_where_a_part_does_not_tell(sides):
    weight, *_ = problem((150, 1300))
    inputs, outputs = (
        factor(torch.eye(k), damping=1) if side else None for k, side in zip((1300, 150), sides, strict=True)
    )
    task = task_of(weight, PerChannel(), inputs, outputs)
    walked = cpu.walk(task)
    assert walked.nearest_measured == 1
    assert walked.nearest_loss == pytest.approx(nearest_loss(task, torch.float64), rel=1e-5)
    assert walked.nearest_loss == pytest.approx(walked.loss, rel=1e-5)


def gptq_in_numpy(weight, scale, h, outside, largest):
    """Frantar et al. 2022, Algorithm 1 with act-order: Cholesky of the inverse, one scale a row."""
    places = np.argsort(-np.diag(h), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(places, places)])).T
    w = weight.double().numpy()[:, places].copy()
    codes = np.zeros(w.shape, outside)
    for j in range(w.shape[1]):
        scaled = w[:, j].astype(np.float32) * (np.float32(1) / scale.numpy()[:, 0])
        codes[:, j] = np.clip(scaled, -np.float32(largest), np.float32(largest)).astype(outside)
        read = codes[:, j].astype(np.float32) * scale.numpy()[:, 0]
        w[:, j + 1 :] -= np.outer((w[:, j] - read) / upper[j, j], upper[j, j + 1 :])
    back = np.empty_like(codes)
    back[:, places] = codes
    return back.view(np.uint8)


@WALK
@pytest.mark.parametrize("outputs", ["none", "identity"])
def test_with_the_identity_for_outputs_it_is_gptq_with_its_order(walk, outputs):
    weight, _, a, _ = problem((24, 40), seed=3)
    inputs = factor(a, damping=0.01)
    h = a.double().numpy() / np.mean(np.diag(a.double().numpy())) + 0.01 * np.eye(40)
    task = task_of(weight, PerChannel(), inputs, None if outputs == "none" else identity(24, weight.device))
    codes = gptq_in_numpy(weight, task.scale, h, ml_dtypes.float8_e4m3fn, 448.0)
    assert np.array_equal(bits(walk(task).codes).numpy(), codes)
    assert not np.array_equal(bits(quantize(weight, task.scale, PerChannel())).numpy(), codes)


@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_without_curvature_it_is_nearest(backend, granularity):
    weight, *_ = problem()
    scale = absmax_scale(weight, granularity)
    nearest = bits(quantize(weight, scale, granularity))
    ones = factor(torch.eye(33), damping=0.1), factor(7 * torch.eye(20), damping=0.1)
    for inputs, outputs in ((None, None), (identity(33, weight.device), None), ones):
        result = round_with_curvature(
            weight, scale, granularity, inputs=inputs, outputs=outputs, backend=backend
        )
        assert torch.equal(bits(result.codes), nearest)
        assert result.kept_nearest
        assert result.predicted_loss == result.nearest_loss


def loss_in_numpy(weight, codes, scale_M1, h_in, h_out):
    error = codes.float().numpy().astype(np.float64) * scale_M1.numpy() - weight.numpy()
    return np.trace(error.T @ h_out @ error @ h_in)


@pytest.mark.parametrize("backend", [reference, cpu])
def test_the_predicted_loss_is_true_and_never_above_that_of_nearest(backend):
    kept = []
    for seed in range(60):
        weight, _, a, g = problem((2, 3), seed=seed, tokens=2)
        scale = absmax_scale(weight, PerChannel())
        result = round_with_curvature(
            weight,
            scale,
            PerChannel(),
            inputs=factor(a, damping=0.001),
            outputs=factor(g, damping=0.01),
            backend=backend,
        )
        h_in, h_out = (
            mixed_in_numpy(h, torch.eye(len(h)), 0, damping) for h, damping in ((a, 0.001), (g, 0.01))
        )
        nearest = quantize(weight, scale, PerChannel())
        expected = loss_in_numpy(weight, nearest, scale, h_in, h_out)
        assert result.nearest_loss == pytest.approx(expected, rel=1e-3)
        expected = loss_in_numpy(weight, result.codes, scale, h_in, h_out)
        assert result.predicted_loss == pytest.approx(expected, rel=1e-3)
        assert result.predicted_loss <= result.nearest_loss
        assert result.kept_nearest == torch.equal(bits(result.codes), bits(nearest))
        kept.append(result.kept_nearest)
    assert 5 < sum(kept) < 55


def test_two_sides_lose_less_than_one_and_one_less_than_nearest():
    weight, delta, a, g = problem((64, 96), tokens=40)
    sides, scale = factor_sides(inputs_NN=a, outputs_MM=g, delta_MN=delta), absmax_scale(weight, PerBlock())
    both = round_with_curvature(weight, scale, PerBlock(), inputs=sides.inputs, outputs=sides.outputs)
    h_in, h_out = (
        mixed_in_numpy(h, u, 0.1, d)
        for h, u, d in zip((a, g), update_statistics(delta), (0.001, 0.01), strict=True)
    )
    rows = round_with_curvature(weight, scale, PerBlock(), inputs=sides.inputs)
    of_rows = loss_in_numpy(weight, rows.codes, scale, h_in, h_out)
    assert both.predicted_loss < 0.5 * of_rows < 0.25 * both.nearest_loss


def test_codes_do_not_depend_on_the_number_of_threads():
    weight, _, a, g = problem((300, 520), tokens=200)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            # the same statistics: they come from elsewhere
            upper = [
                cpu.unit_upper(mix(h, None, 0, 0.01).to(dtype), torch.arange(len(h)))
                for h in (a, g)
                for dtype in (torch.float32, torch.float64)
            ]
            sides = factor_sides(inputs_NN=a, outputs_MM=g)
            walked = cpu.walk(task_of(weight, PerBlock(), *sides))
            found.append(
                [bits(walked.codes), torch.tensor(walked[1:]), *(tensor for pair in upper for tensor in pair)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("tokens", [1, 400])
def test_a_factor_multiplies_back_to_the_curvature(size, tokens):
    _, _, a, _ = problem((1, size), tokens=tokens)
    h = mix(a.double(), None, 0, 0.001)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    for unit_upper, dtype, tolerance in (
        (triangular.unit_upper, torch.float64, 1e-6),
        (cpu.unit_upper, torch.float64, 1e-6),
        (cpu.unit_upper, torch.float32, 1e-5),
    ):
        upper, diagonal = unit_upper(h.to(dtype), order)
        assert upper.dtype == torch.float32
        assert torch.equal(upper, upper.triu())
        assert bool((upper.diagonal() == 1).all())
        back = upper.double() * diagonal @ upper.double().T
        ordered = h[order][:, order]
        size_of = (ordered.diagonal()[:, None] * ordered.diagonal()).sqrt()
        assert float(((back - ordered) / size_of).abs().max()) < tolerance
        assert float(diagonal.min()) > 0.0009


def test_a_large_curvature_is_factored_in_float32_and_where_that_fails_in_float64(monkeypatch):
    used = []

    def unit_upper(matrix, order):
        used.append(matrix.dtype)
        return cpu.unit_upper(matrix, order)

    monkeypatch.setattr("daq_lightning.numerics.rounding.curvature._EXACT", 10)
    monkeypatch.setattr("daq_lightning.numerics.rounding.curvature.choose", lambda _: Fake)

    class Fake:
        pass

    Fake.unit_upper = staticmethod(unit_upper)
    _, _, a, _ = problem((1, 90), tokens=30)
    rough = factor(a, damping=0.001)
    assert used == [torch.float32]
    used.clear()
    ones = torch.ones(90, 90).double()  # parallel inputs
    exact = factor(ones, damping=1e-8)
    assert used == [torch.float32, torch.float64]
    assert float(exact.diagonal.min()) >= 0.9e-8
    assert torch.equal(rough.order, factor(a.double(), damping=0.001).order)


def test_mix_is_the_formula_and_a_zero_update_adds_nothing():
    _, delta, a, _ = problem()
    u, _ = update_statistics(delta)
    np.testing.assert_allclose(u.numpy(), delta.double().numpy().T @ delta.double().numpy(), atol=1e-6)
    mixed = mix(a.double(), u, 0.3, 0.02)
    np.testing.assert_allclose(mixed.numpy(), mixed_in_numpy(a, u, 0.3, 0.02), rtol=1e-6, atol=1e-9)
    assert torch.equal(mix(a, torch.zeros_like(a), 0.3, 0.02), mix(a, None, 0.3, 0.02))
    one = factor(a, u, share=0.3, damping=0.02)
    diagonal = torch.from_numpy(np.diag(mixed.numpy()).copy())[one.order]
    assert bool((diagonal[1:] <= diagonal[:-1]).all())
    assert torch.equal(factor(a, damping=0.1, order=False).order, torch.arange(33))


def test_the_update_stands_in_for_statistics_that_are_missing():
    _, delta, a, _ = problem()
    u_in, u_out = update_statistics(delta)
    sides = factor_sides(inputs_NN=a, delta_MN=delta)
    assert torch.equal(sides.outputs.diagonal, factor(u_out, damping=0.01).diagonal)
    assert torch.equal(sides.inputs.diagonal, factor(a, u_in, damping=0.001).diagonal)
    alone = factor_sides(RoundingSettings(damping_in=0.1, damping_out=0.3, order=False), delta_MN=delta)
    assert torch.equal(alone.inputs.diagonal, factor(u_in, damping=0.1, order=False).diagonal)
    assert factor_sides() == (None, None)
    lora = factor_sides(RoundingSettings(update=0), inputs_NN=a, outputs_MM=None, delta_MN=delta)
    assert torch.equal(lora.inputs.diagonal, factor(a, damping=0.001).diagonal)


EYE = torch.eye(4)
BAD_STATISTICS = {
    "not square": (torch.ones(3, 4), ValueError, r"shape \(3, 4\), expected a square matrix"),
    "one dimension": (torch.ones(4), ValueError, "square matrix"),
    "empty": (torch.ones(0, 0), ValueError, "square matrix"),
    "nan": (EYE * float("nan"), ValueError, "16 values that are NaN or Inf"),
    "inf": (EYE.where(EYE == 0, torch.inf), ValueError, "4 values that are NaN or Inf"),
    "not symmetric": (EYE + torch.ones(4, 4).triu(1), ValueError, "not symmetric"),
    "zero": (0 * EYE, ValueError, "trace of 0, expected one > 0"),
    "negative": (-EYE, ValueError, "trace of -4"),
    "indefinite": (torch.ones(4, 4) * 2 - EYE, ValueError, "not positive semi-definite"),
    "bfloat16": (EYE.bfloat16(), TypeError, "expected float32 or float64"),
    "sparse": (EYE.to_sparse(), TypeError, "dense"),
    "no tensor": ([[1.0]], TypeError, "list"),
}


@pytest.mark.parametrize(("given", "error", "match"), BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_bad_statistics_are_named(given, error, match):
    with pytest.raises(error, match=f"inputs.*{match}"):
        factor_sides(inputs_NN=given)


def test_singular_statistics_are_fine_once_they_are_damped():
    assert float(factor(torch.ones(4, 4), damping=0.001).diagonal.min()) > 0
    with pytest.raises(ValueError, match=r"damping must be > 0, got 0"):
        factor(torch.ones(4, 4), damping=0)


def test_an_update_of_another_side_is_named():
    with pytest.raises(ValueError, match=r"shape \(4, 4\).*shape \(3, 3\)"):
        factor(EYE, torch.eye(3), damping=0.1)


GOOD = {"weight": torch.ones(2, 4), "scale": torch.ones(2, 1), "granularity": PerChannel()}
BAD = {
    "scale shape": ({"scale": torch.ones(4, 1)}, ValueError, r"scale of shape \(2, 1\)"),
    "scale dtype": ({"scale": torch.ones(2, 1).double()}, ValueError, "scales > 0 in float32"),
    "scale zero": ({"scale": torch.zeros(2, 1)}, ValueError, "scales > 0"),
    "scale nan": ({"scale": torch.full((2, 1), torch.nan)}, ValueError, "scales > 0"),
    "weight nan": ({"weight": torch.full((2, 4), torch.nan)}, ValueError, "up has 8 NaN or Inf"),
    "weight dtype": ({"weight": torch.ones(2, 4).double()}, TypeError, "float64"),
    "weight 3-d": ({"weight": torch.ones(1, 2, 4)}, ValueError, "non-empty matrix"),
    "weight empty": ({"weight": torch.ones(0, 4)}, ValueError, "non-empty matrix"),
    "inputs of outputs": (
        {"inputs": identity(2, torch.device("cpu"))},
        ValueError,
        "inputs of size 4, got 2",
    ),
    "outputs of inputs": (
        {"outputs": identity(4, torch.device("cpu"))},
        ValueError,
        "outputs of size 2, got 4",
    ),
    "statistics": ({"inputs": EYE}, TypeError, "Factor or None, got Tensor"),
    "weight elsewhere": ({"weight": torch.ones(2, 4, device="meta")}, ValueError, "meta device"),
    "inputs elsewhere": ({"inputs": identity(4, torch.device("meta"))}, ValueError, "inputs on meta"),
    "scale elsewhere": ({"scale": torch.ones(2, 1, device="meta")}, ValueError, "scale on meta"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, error, match):
    with pytest.raises(error, match=match):
        round_with_curvature(**(GOOD | change), name="up")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("update", -0.1, ValueError),
        ("damping_in", 0, ValueError),
        ("damping_out", float("inf"), ValueError),
        ("damping_in", float("nan"), ValueError),
        ("update", "much", TypeError),
        ("order", 1, TypeError),
    ],
)
def test_settings_are_checked_when_they_are_made(field, value, error):
    with pytest.raises(error, match=field):
        RoundingSettings(**{field: value})


def test_a_weight_of_huge_values_gets_codes_and_no_nan():
    weight, _, a, g = problem((16, 24))
    sides = factor_sides(inputs_NN=a, outputs_MM=g)
    scale = absmax_scale(weight, PerChannel()) / 100  # nearly all saturate: the feedback grows
    result = round_with_curvature(weight, scale, PerChannel(), inputs=sides.inputs, outputs=sides.outputs)
    assert bool(result.codes.float().isfinite().all())
    assert result.predicted_loss <= result.nearest_loss


def test_factors_say_what_they_are():
    one = identity(3, torch.device("cpu"))
    assert isinstance(one, Factor)
    assert one.order.tolist() == [0, 1, 2]
