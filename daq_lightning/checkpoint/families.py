"""What the schemes make of weights, in a word: for titles, tags and notes."""

from __future__ import annotations

from collections.abc import Mapping

FAMILIES: Mapping[str, str] = {
    "FP8_BLOCK": "FP8",
    "FP8_DYNAMIC": "FP8",
    "FP8A16": "FP8",
    "MXFP8": "FP8",
    "W8A8": "INT8",
    "W4A16": "INT4",
    "W4A16_ASYM": "INT4",
    "W4A16_G32": "INT4",
    "W4A16_ASYM_G32": "INT4",
    "NVFP4A16": "FP4",
    "MXFP4A16": "FP4",
}
"""Scheme -> what its codes are; every one of `daq_lightning.checkpoint.schemes.SCHEMES` is here."""


def family_of(scheme: str) -> str:
    """ "FP8", "INT8", "INT4" or "FP4"; an unknown scheme, such as a report may have, stands for itself.

    Example:
        >>> family_of("FP8_BLOCK"), family_of("NVFP4A16")
        ('FP8', 'FP4')
    """
    return FAMILIES.get(scheme, scheme)
