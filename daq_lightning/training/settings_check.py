"""What a user passes to the callback, checked when it is made: each error says what was expected instead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from daq_lightning.checkpoint.schemes import SchemeName
from daq_lightning.export.settings import ExportSettings
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.objectives import Metric
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch

MissingBase: TypeAlias = Literal["error", "absmax"]


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises MisconfigurationException, with what was expected of an argument and what came, if not ok."""
    if not ok:
        raise MisconfigurationException(f"{name}={value!r}: expected {expected}.")


@contextlib.contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turns what is wrong with a model into what Lightning calls a misconfigured run."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raises MisconfigurationException for a value that is none of the choices."""
    require(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")


def flag(name: str, value: object) -> None:
    """Raises MisconfigurationException for what is neither True nor False: "no" would count as true."""
    require(isinstance(value, bool), name, value, "True or False")


def count(name: str, value: object) -> None:
    """Raises MisconfigurationException for what is neither None nor a whole number >= 1; True is none."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(value is None or whole, name, value, "a whole number of at least 1, or None")


def path(name: str, value: Any, expected: str) -> str:
    """The path as a string; anything that is no path (None would become a folder "None") is refused."""
    require(isinstance(value, (str, os.PathLike)) and str(value) != "", name, value, expected)
    return os.path.expanduser(value)


def local_path(name: str, value: Any, expected: str) -> str:
    """The path as a string; one on another machine is refused."""
    value = path(name, value, expected)
    if "://" in value:
        raise MisconfigurationException(
            f"{name}={value!r}: exports are renamed into place, which needs a local file system. Export to a "
            "local folder and upload it afterwards."
        )
    return value


def chain(parent: Any, chain_from: Any, base: str) -> str | None:
    """The parent as a string; a parent and what the run began with belong together.

    Args:
        parent: Folder of the export before.
        chain_from: None, "weights" or "deployed".
        base: The base of the run; a folder may be the parent itself.
    """
    parent = None if parent is None else path("parent", parent, "None or a path")
    choice("chain_from", chain_from, (None, "weights", "deployed"))
    if parent is not None and chain_from is None:
        raise MisconfigurationException(
            f"parent={parent!r}: say what this stage was trained from with chain_from='deployed' (the "
            "parent's dequantized FP8 weights) or chain_from='weights' (the high-precision weights it was "
            "made from)."
        )
    folder = base not in ("auto", "snapshot", "memory") and not base.endswith(".ckpt")
    if chain_from is not None and parent is None and not folder:
        raise MisconfigurationException(
            f"chain_from={chain_from!r}: needs parent='<folder of the export before>'; leave chain_from out "
            "for a run that goes on from none."
        )
    return parent


def make_settings(
    scheme: SchemeName,
    metric: Metric | None,
    alpha_range: tuple[float, float] | None,
    search: ScaleSearch | None,
    ignore: Sequence[str] | None,
    scale_format: ScaleFormat | None,
    missing_base: MissingBase,
    max_shard_bytes: int,
    rounding: RoundingChoice,
) -> ExportSettings:
    """The settings of an export from the arguments of `DeltaAwareQuantization`.

    Raises:
        MisconfigurationException: A value of a wrong kind, or values that contradict each other.
    """
    choice("scheme", scheme, get_args(SchemeName))
    require(metric is None or isinstance(metric, str), "metric", metric, "None or a str, such as 'cosine'")
    require(
        search is None or isinstance(search, ScaleSearch), "search", search,
        "a ScaleSearch, or None; what to maximize alone is said by metric='cosine'",
    )  # fmt: skip
    require(
        ignore is None
        or (isinstance(ignore, (list, tuple)) and all(isinstance(name, str) for name in ignore)),
        "ignore", ignore, "a list of names, such as ['lm_head']",
    )  # fmt: skip
    choice("rounding", rounding, get_args(RoundingChoice))
    choice("scale_format", scale_format, (None, "ue8m0"))
    choice("missing_base", missing_base, ("error", "absmax"))
    whole = isinstance(max_shard_bytes, int) and not isinstance(max_shard_bytes, bool)
    require(whole, "max_shard_bytes", max_shard_bytes, "a whole number of bytes, such as 2_000_000_000")
    if alpha_range is not None:
        two = isinstance(alpha_range, (list, tuple)) and len(alpha_range) == 2
        numbers = two and all(
            isinstance(end, (int, float)) and not isinstance(end, bool) for end in alpha_range
        )
        require(numbers, "alpha_range", alpha_range, "two numbers, such as (0.8, 1.25)")
    if search is not None and (metric is not None or alpha_range is not None):
        raise MisconfigurationException(
            "search=... already holds metric and range: leave metric and alpha_range out."
        )
    if rounding == "auto" and not (search is None and metric is None and alpha_range is None):
        rounding = "nearest"  # of the scales that were asked for
    try:
        if search is None:
            low, high = alpha_range or (ScaleSearch.alpha_min, ScaleSearch.alpha_max)
            search = ScaleSearch(metric=metric or ScaleSearch.metric, alpha_min=low, alpha_max=high)
        return ExportSettings(
            scheme=scheme,
            search=search,
            rounding=rounding,
            ignore=tuple(ignore or ()),
            scale_format=scale_format,
            missing_base=missing_base,
            max_shard_bytes=max_shard_bytes,
        )
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(str(error)) from error
