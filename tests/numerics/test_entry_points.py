"""What the C++ library is given it checks: wrong arguments are an exception that says which, never a
crash."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from daq_lightning.numerics.backends import cpu, fold, structs
from daq_lightning.numerics.backends.library import array as array_of
from daq_lightning.numerics.formats import PerBlock, PerChannel
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4_ASYM

M, N, K = 6, 8, 3
GROUPS = 6  # blocks of 2 x 4


def arguments(function: str) -> tuple[list[Any], list[torch.Tensor]]:
    """Right arguments of an entry point, and the tensors that they point to."""
    weight, base = torch.randn(M, N), torch.randn(M, N)
    kept: list[torch.Tensor] = [weight, base]

    def array(*shape: int, dtype: torch.dtype) -> Any:
        kept.append(torch.ones(shape, dtype=dtype))
        return array_of(kept[-1])

    matrices = [cpu._matrix(weight), cpu._matrix(base)]
    plan, whole = cpu._plan(weight, PerBlock(2, 4))[0], cpu._format(INT4_ASYM)
    float32, float64, int64, uint8 = torch.float32, torch.float64, torch.int64, torch.uint8
    if function == "absmax":
        return [matrices[0], plan, 1, array(GROUPS, dtype=float32)], kept
    if function == "quantize":
        zero = array(GROUPS, dtype=torch.int8)
        return [
            matrices[0],
            plan,
            whole,
            array(GROUPS, dtype=float32),
            zero,
            1,
            array(M, N, dtype=uint8),
        ], kept
    if function == "delta_stats":
        scales = array(GROUPS, K, dtype=float32)
        return [
            *(*matrices, plan, whole, scales, array(GROUPS, K, dtype=torch.int8), K, 0, 1),
            array(6, GROUPS, K, dtype=int64),
            array(4, GROUPS, K, dtype=float64),
        ], kept
    if function == "fold":
        return [array(10, dtype=int64), 10, array(4, dtype=int64), 4, array(3, dtype=int64)], kept
    if function == "unit_upper":
        return [
            *(array(N, N, dtype=float32), array(N, dtype=int64), N, 32, 1),
            *(array(N, N, dtype=float32), array(N, dtype=float64)),
        ], kept
    if function == "walk":
        sides = [
            structs.SideStruct(array(k, dtype=int64), array(k, k, dtype=float32), array(k, dtype=float64))
            for k in (N, M)
        ]
        return [
            *(
                matrices[0],
                plan,
                whole,
                array(GROUPS, dtype=float32),
                array(GROUPS, dtype=torch.int8),
                *sides,
                1,
            ),
            *(array(M, N, dtype=uint8), array(3, dtype=float64)),
        ], kept
    candidates = array(K, dtype=float64), array(2, dtype=float64)
    search = structs.SearchStruct(0, 0, K, 2, 0.01, 0.5, 2.0, 0.1, *candidates, 2, 1.0, 1)
    found = structs.FoundStruct(
        array(GROUPS, dtype=float32),
        array(GROUPS, dtype=float64),
        array(6, 3, GROUPS, dtype=int64),
        array(4, 3, GROUPS, dtype=float64),
        array(M, N, dtype=uint8),
        array(GROUPS, dtype=torch.int8),
    )
    return [*matrices, plan, whole, search, 1, found], kept


FUNCTIONS = ["absmax", "quantize", "delta_stats", "fold", "search", "unit_upper", "walk"]
PLANS = {"m": -1, "n": 0, "cell_rows": 0, "cell_cols": 9, "chunk_rows": 3, "chunk_cols": -(2**63)}


def entry_point(function):
    return fold._fold() if function == "fold" else cpu._entry_point(function)


def faults(function: str) -> list[tuple[str, str, Any]]:
    """(what, name of the attribute, its wrong value); a number in `what` is the argument's place."""
    places = {
        "absmax": [3],
        "quantize": [3, 6],
        "delta_stats": [4, 9, 10],
        "fold": [0, 2, 4],
        "search": [],
        "unit_upper": [0, 1, 5, 6],
        "walk": [3, 8, 9],
    }[function]
    found: list[tuple[str, str, Any]] = []
    for place in places:
        found += [(str(place), "data", None), (str(place), "bytes", 4), (str(place), "bytes", 0)]
    if function == "fold":
        return [*found, ("1", "", -1), ("1", "", 2**62), ("3", "", 0), ("3", "", 2**62)]
    if function == "unit_upper":
        found += [("2", "", value) for value in (0, -1, N + 1, 2**62)]
        return [*found, ("3", "", 16), ("3", "", 64), ("4", "", 0), ("4", "", 2**40)]
    plan = 2 if function in ("delta_stats", "search") else 1
    for matrix in range(plan):
        found += [(str(matrix), "data", None), (str(matrix), "dtype", 3), (str(matrix), "dtype", -1)]
        found += [
            (str(matrix), "stride", -8),
            (str(matrix), "stride", 9),
            (str(matrix), "bytes", M * N * 4 - 1),
        ]
        found += [(str(matrix), "stride", 2**62)]
    found += [(str(plan), name, value) for name, value in PLANS.items()]
    found += [(str(plan), "m", 2**62), (str(plan), "n", 2**63 - 1)]
    threads = {"absmax": 2, "quantize": 5, "delta_stats": 8, "search": 5, "walk": 7}[function]
    found += [(str(threads), "", value) for value in (0, -3, 2**40)]
    if function != "absmax":
        for name, value in (("max", 0.0), ("max", float("inf")), ("max", 2.0**-9), ("min_normal", 0.0)):
            found += [(str(plan + 1), name, value)]
        found += [(str(plan + 1), "min_normal", 0.75), (str(plan + 1), "mantissa_bits", 0)]
        found += [(str(plan + 1), "mantissa_bits", 23), (str(plan + 1), "mantissa_bits", -1)]
        for name, value in (
            ("low", 1.0),
            ("low", -1e9),
            ("low", -200.0),
            ("reach", 1.0),
            ("reach", 1e9),
            ("storage", 3),
        ):
            found += [(str(plan + 1), name, value)]
        found += [(str(plan + 1), "storage", value) for value in (-1, 0, 1)]  # there are zero points
        zero = {"quantize": "4", "delta_stats": "5", "walk": "4"}.get(function)
        name = "" if zero else "zero."
        found += [(zero or "6", f"{name}{field}", wrong) for field, wrong in (("data", None), ("bytes", 4))]
    if function == "delta_stats":
        found += [("6", "", value) for value in (0, -1, K + 1, 2**60)]
        found += [("7", "", value) for value in (-1, 3)]
    if function == "walk":
        for name in ("order", "unit_upper", "diagonal"):
            found += [
                (side, f"{name}.{field}", wrong)
                for side in "56"
                for field, wrong in (("data", None), ("bytes", 4))
            ]
    if function == "search":
        for name in ("metric", "scale_format", "reader"):
            found += [("4", name, -1), ("4", name, 4)]
        found += [("4", "reader", 0)]  # none, but room for its sums
        found += [("4", "global_scale", value) for value in (0.0, 2.0**127, float("nan"))]
        found += [("4", "n_coarse", value) for value in (0, -1, K + 1, 2**62)]
        found += [("4", "n_fine", value) for value in (-1, 3, 2**62)]
        found += [("4", "pool", value) for value in (0, -1, 2, 2**62)]
        for name in ("scale", "alpha", "counts", "totals", "codes"):
            found += [("6", f"{name}.data", None), ("6", f"{name}.bytes", 4)]
        for name in ("coarse", "steps"):
            found += [("4", f"{name}.data", None), ("4", f"{name}.bytes", 4)]
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_arguments_are_taken(function):
    given, _kept = arguments(function)
    entry_point(function)(*given)


@pytest.mark.parametrize(
    ("function", "place", "name", "value"), [(f, *fault) for f in FUNCTIONS for fault in faults(f)], ids=str
)
def test_wrong_arguments_are_refused(function, place, name, value):
    given, kept = arguments(function)
    before = [copy.copy(tensor.clone()) for tensor in kept]
    if name:
        owner = given[int(place)]
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    else:
        given[int(place)] = value
    with pytest.raises(RuntimeError, match=f"daq_{function} refused its arguments"):
        entry_point(function)(*given)
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(kept, before, strict=True))


@pytest.mark.parametrize(("function", "place"), [("unit_upper", 1), ("walk", 5), ("walk", 6)])
@pytest.mark.parametrize("index", [-1, 8, 2**62])
def test_an_order_that_points_outside_is_refused(function, place, index):
    given, kept = arguments(function)
    owner = given[place].order if function == "walk" else given[place]
    [order] = [tensor for tensor in kept if tensor.data_ptr() == owner.data]
    order[3] = index
    with pytest.raises(RuntimeError, match="the order"):
        entry_point(function)(*given)


@pytest.mark.parametrize(
    "scale", [torch.ones(6, 1).double(), torch.ones(6, 1).bfloat16(), torch.ones(5, 1)], ids=str
)
def test_scales_of_another_dtype_or_number_are_refused(scale):
    with pytest.raises(RuntimeError, match="scales"):
        cpu.quantize(torch.ones(6, 8), scale, PerChannel(), FP8_E4M3)
    with pytest.raises(RuntimeError, match="scales"):
        cpu.delta_stats(torch.ones(6, 8), torch.ones(6, 8), scale, PerChannel(), FP8_E4M3)


def test_zero_points_beyond_the_codes_are_refused():
    for value in (-9, 8, 127):
        zero = torch.tensor([[0], [value]], dtype=torch.int8)
        with pytest.raises(RuntimeError, match="zero points"):
            cpu.quantize(torch.ones(2, 8), torch.ones(2, 1), PerChannel(), INT4_ASYM, zero)
    with pytest.raises(RuntimeError, match="zero points of this format"):
        cpu.quantize(
            torch.ones(2, 8), torch.ones(2, 1), PerChannel(), FP8_E4M3, torch.zeros(2, 1).to(torch.int8)
        )


def test_tensors_that_a_file_was_mapped_to_may_begin_anywhere():
    raw = torch.zeros(4 * 6 * 8 + 1, dtype=torch.uint8)
    expected = torch.randn(6, 8)
    raw.numpy()[1:] = expected.view(torch.uint8).flatten().numpy()
    odd = torch.frombuffer(memoryview(raw.numpy().data)[1:], dtype=torch.float32).reshape(6, 8)
    assert odd.data_ptr() % 4
    assert torch.equal(cpu.absmax(odd, PerChannel())[:, 0], expected.abs().amax(1))
