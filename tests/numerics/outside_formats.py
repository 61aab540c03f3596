"""Every format beside what somebody else says of it: the same values by ml_dtypes and NumPy."""

import ml_dtypes
import numpy as np
import torch
from toy_format import E5M2

from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4
from daq_lightning.numerics.formats.int8 import INT8

FORMATS = {
    "e4m3": (FP8_E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
    "e2m1": (FP4_E2M1, ml_dtypes.float4_e2m1fn),
    "int8": (INT8, np.int8),
    "int4": (INT4, ml_dtypes.int4),
}
HELD_AS = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.int8: np.int8,
}


def whole(outside):
    """Whether it is a format of integers."""
    return outside in (np.int8, ml_dtypes.int4)


def rounded(scaled, fmt, outside):
    """float32 values that are divided by their scale -> values of the format."""
    clipped = np.clip(scaled, np.float32(fmt.low), np.float32(fmt.max))
    clipped = np.rint(clipped) if whole(outside) else clipped  # conversions to integers cut off
    return clipped.astype(outside).astype(np.float32)


def held(values, fmt):
    """The bytes that hold these values in memory."""
    return values.astype(HELD_AS[fmt.dtype]).view(np.uint8)
