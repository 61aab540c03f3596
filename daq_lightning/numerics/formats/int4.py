"""Integers of 4 bits: -8 to 7, one scale for 128 weights of a row (W4A16), or for 32 (W4A16_G32).

Plain quantization maps the largest magnitude of a group to 7.5, the middle of the range of 15 steps. With a
zero point (W4A16_ASYM) it maps the smallest and largest weight of a group, and 0, to the 15 steps.

Source: compressed-tensors 0.20, `calculate_qparams` and `calculate_range`.
"""

from __future__ import annotations

import dataclasses

from daq_lightning.numerics.formats import Format

INT4 = Format(dtype_name="int8", max=7.0, lowest=-8.0, reach=7.5, min_normal=4.0, mantissa_bits=2, bits=4)
INT4_ASYM = dataclasses.replace(INT4, reach=15.0, zero_point=True)
