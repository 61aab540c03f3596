"""E2M1, the four bits of NVFP4 and MXFP4: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; no infinity, no NaN.

Every value is one of E4M3 as well, which holds the codes in memory; two share a byte in a file.

Source: OCP Microscaling Formats (MX) specification, version 1.0, section 5.3.3.
"""

from __future__ import annotations

from daq_lightning.numerics.formats import Format

FP4_E2M1 = Format(dtype_name="float8_e4m3fn", max=6.0, min_normal=1.0, mantissa_bits=1, bits=4)
