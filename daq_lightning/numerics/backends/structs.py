"""The structs of the C++ library, field by field as its sources declare them (`src/common.h`, `search.h`,
`rounding.cpp`)."""

from __future__ import annotations

import ctypes

from daq_lightning.numerics.backends.library import Array


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class PlanStruct(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ["m", "n", "cell_rows", "cell_cols", "chunk_rows", "chunk_cols"]
    )


class FormatStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ["max", "low", "reach", "min_normal"]),
        *((name, ctypes.c_int64) for name in ["mantissa_bits", "storage"]),
    )


class SideStruct(ctypes.Structure):
    _fields_ = tuple((name, Array) for name in ["order", "unit_upper", "diagonal"])


class SearchStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ["metric", "scale_format", "n_coarse", "n_fine"]),
        *((name, ctypes.c_double) for name in ["tau", "alpha_min", "alpha_max", "radius"]),
        *((name, Array) for name in ["coarse", "steps"]),
        ("reader", ctypes.c_int64),
        ("global_scale", ctypes.c_double),
        ("pool", ctypes.c_int64),
    )


class FoundStruct(ctypes.Structure):
    _fields_ = tuple((name, Array) for name in ["scale", "alpha", "counts", "totals", "codes", "zero"])
