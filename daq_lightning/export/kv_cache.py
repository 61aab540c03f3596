"""The FP8 cache of keys and values: which layers have scales, under which names, and their values.

    in_container, with_cache            the plan of the weights, and two tensors more for each attention
    constant_scales, found_scales       what those tensors hold

The compressed-tensors container is taken, the only one whose config.json has a word for it, and a model of
which any attention caches something else than keys and values is refused: its reader would have scales that
nobody wrote.

Source: `daq_lightning.checkpoint.kv_cache`, `daq_lightning.model.attention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.kv_cache import is_cache_scale, scale_names
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.outline import CacheKind, Outline, owner_of
from daq_lightning.numerics.kv_cache import cache_scale
from daq_lightning.report.kv_cache import CacheReport

if TYPE_CHECKING:
    from daq_lightning.export.plan import ExportPlan, TensorPlan
    from daq_lightning.export.settings import ExportSettings

_REFUSED: Mapping[CacheKind, str] = {
    "latent": "caches what its keys and values are made of (MLA), which has no scale of keys and none of "
    "values",
    "shared": "reads the keys and values of another layer",
    "cross": "may look at an encoder or an image, whose keys no text of the model shows",
    "unknown": "makes its keys and values in a way for which transformers and vLLM have no scales",
}
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class CacheScales:
    """The values of the scales.

    Attributes:
        values: Tensor -> scale, a number of bfloat16.
        found_on: What they were found on, in words; "" for constant ones.
        tokens: How many tokens that was.
        text: The file that was read, if it was one.
    """

    values: Mapping[str, float]
    found_on: str = ""
    tokens: int = 0
    text: Path | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> float32 (1,), as the file holds it."""
        return {
            name: torch.tensor([value], dtype=torch.float32, device="cpu")
            for name, value in self.values.items()
        }


def in_container(specs: Sequence[TensorSpec], outline: Outline, settings: ExportSettings) -> ExportSettings:
    """The settings of weights beside which there is such a cache.

    Args:
        specs: The tensors of the checkpoint.
        outline: What they are.
        settings: What the user chose; without a cache they come back as they are.

    Raises:
        CheckpointError: FP8_BLOCK of a mixture of experts, which the container has no reader for.
    """
    if settings.kv_cache is None:
        return settings
    experts = any(outline.role(outline.keys[spec.name], len(spec.shape)) == "expert" for spec in specs)
    if experts and settings.scheme == "FP8_BLOCK":
        raise CheckpointError(
            "kv_cache needs the compressed-tensors container, in which transformers cannot load FP8_BLOCK of "
            "a mixture-of-experts model. Use scheme='FP8_DYNAMIC', or leave kv_cache out."
        )
    scheme = "FP8_DYNAMIC" if experts and settings.scheme == "auto" else settings.scheme
    return dataclasses.replace(settings, scheme=scheme, container="compressed-tensors")


def with_cache(plan: ExportPlan, outline: Outline, settings: ExportSettings) -> ExportPlan:
    """The plan with the scales of the cache, if there is to be one.

    Args:
        plan: Of the weights, in the container that `in_container` chose.
        outline: What they are.
        settings: What the user chose.

    Raises:
        CheckpointError: A model that has no such cache, or of which a layer has another one.
    """
    if settings.kv_cache is None:
        return plan
    modules = _cached(outline)
    on_disk = {key: name for name, key in reversed(list(outline.keys.items()))}
    scales: list[TensorPlan] = []
    for module in modules:
        names = scale_names(_on_disk(module, on_disk, outline))
        scales += [
            _planned(plan.tensors[0], name, key) for name, key in zip(names, scale_names(module), strict=True)
        ]
    there = sorted({scale.spec.name for scale in scales} & {tensor.spec.name for tensor in plan.tensors})
    if there:
        raise CheckpointError(
            f"The model already has {', '.join(there[:_LISTED])}, the scales of a cache: export the model it "
            "was made from."
        )
    return dataclasses.replace(
        plan,
        tensors=(*map(_in_cached, plan.tensors), *scales),
        rungs=tuple(dataclasses.replace(layout, kv_cache=True) for layout in plan.rungs),
        notes=(*plan.notes, *_notes(outline, modules, plan, settings)),
    )


def cached_modules(plan: ExportPlan) -> dict[str, tuple[str, str]]:
    """Attention layer, by its name in memory -> the names of its two scales in the files."""
    found: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if _is_scale(tensor):
            found.setdefault(owner_of(tensor.key), []).append(tensor.spec.name)
    return {module: (names[0], names[1]) for module, names in found.items()}


def constant_scales(plan: ExportPlan, settings: ExportSettings) -> CacheScales | None:
    """Scales of 1; None where there is to be none, or they are still to be found."""
    if settings.kv_cache != "fp8":
        return None
    names = [name for pair in cached_modules(plan).values() for name in pair]
    return CacheScales(values=dict.fromkeys(names, 1.0))


def found_scales(
    plan: ExportPlan,
    peaks: Mapping[str, tuple[float, float]],
    *,
    found_on: str,
    tokens: int,
    text: Path | None = None,
) -> CacheScales:
    """The scales that hold all that was seen.

    Args:
        plan: With the cache.
        peaks: Attention layer -> the largest absolute value of its keys, and of its values.
        found_on: See `CacheScales`.
        tokens: Likewise.
        text: Likewise.

    Raises:
        ValueError: A layer was not seen, or had NaN or Inf, by name.
    """
    modules = cached_modules(plan)
    unseen = [module for module in modules if module not in peaks]
    if unseen:
        more = f" and {len(unseen) - _LISTED} more" if len(unseen) > _LISTED else ""
        raise ValueError(
            f"Nothing entered the caches of {', '.join(unseen[:_LISTED])}{more} on {found_on}, so they have "
            "no scales. The model has to be run through its own forward, and each layer has to give keys and "
            "values to `update` of its cache; or use kv_cache='fp8', whose scales are 1."
        )
    values: dict[str, float] = {}
    for module, names in modules.items():
        try:
            scales = cache_scale(torch.tensor(peaks[module], dtype=torch.float64, device="cpu"))
        except ValueError as error:
            raise ValueError(
                f"{module} cached NaN or Inf on {found_on}: the training run has diverged, or the data does. "
                "Export an earlier checkpoint, or use kv_cache='fp8', whose scales are 1."
            ) from error
        values.update(zip(names, scales.tolist(), strict=True))
    return CacheScales(values=values, found_on=found_on, tokens=tokens, text=text)


def check_found(settings: ExportSettings, scales: CacheScales | None) -> None:
    """Raises ValueError where scales are to be found on data, and there was none."""
    if settings.kv_cache == "fp8-calibrated" and scales is None:
        raise ValueError(
            "kv_cache='fp8-calibrated' needs data that shows keys and values: a text (kv_text), or the "
            "validation batches of a run with DeltaAwareQuantization. kv_cache='fp8' needs none."
        )


def report_of(plan: ExportPlan, scales: CacheScales | None) -> CacheReport | None:
    """What the report says of the cache; None without one."""
    if scales is None:
        return None
    layers = {
        names[0].rpartition(".")[0]: (scales.values[names[0]], scales.values[names[1]])
        for names in cached_modules(plan).values()
    }
    return CacheReport(layers=layers, found_on=scales.found_on, tokens=scales.tokens)


def kept_reasons(plan: ExportPlan) -> dict[str, str]:
    """Tensor of the model -> why it is not quantized."""
    kept = (tensor for tensor in plan.tensors if not (tensor.quantize or _is_scale(tensor)))
    return {tensor.spec.name: tensor.reason for tensor in kept}


def _cached(outline: Outline) -> list[str]:
    """The layers that cache keys and values, in their order.

    Raises:
        CheckpointError: There is none, or a layer caches something else.
    """
    for kind, why in _REFUSED.items():
        names = [name for name, found in outline.caches.items() if found == kind]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"kv_cache: {names[0]}{more} of {outline.model} {why}. Leave kv_cache out; a server may "
                "still quantize its cache by itself."
            )
    modules = [name for name, kind in outline.caches.items() if kind in ("full", "sliding")]
    if not modules:
        raise CheckpointError(
            f"kv_cache: {outline.model} has no attention that transformers knows to cache keys and values. "
            "Leave kv_cache out."
        )
    return modules


def _on_disk(module: str, names: Mapping[str, str], outline: Outline) -> str:
    """The name of an attention layer in the checkpoint: that of the layer around its projection."""
    for leaf in ("k_proj", "qkv_proj"):
        weight = names.get(f"{module}.{leaf}.weight")
        if weight is not None:
            return owner_of(owner_of(weight))
    raise CheckpointError(
        f"kv_cache: the checkpoint of {outline.model} has no weight of {module}.k_proj, beside which the "
        "scales of its cache belong."
    )


def _planned(other: TensorPlan, name: str, key: str) -> TensorPlan:
    """The plan of a scale, made from that of any tensor."""
    spec = TensorSpec(name=name, dtype=torch.float32, shape=(1,))
    return dataclasses.replace(
        other,
        spec=spec,
        key=key,
        role="other",
        quantize=False,
        stored={KEPT: spec},
        reason="scale of the KV cache",
        together="",
    )


def _in_cached(tensor: TensorPlan) -> TensorPlan:
    """A tensor in a layout that speaks of the cache."""
    if tensor.form is None:
        return tensor
    return dataclasses.replace(tensor, form=dataclasses.replace(tensor.form, kv_cache=True))


def _is_scale(tensor: TensorPlan) -> bool:
    return not tensor.quantize and is_cache_scale(tensor.spec.name) and tensor.spec.shape == (1,)


def _notes(outline: Outline, modules: Sequence[str], plan: ExportPlan, settings: ExportSettings) -> list[str]:
    sliding = [name for name in modules if outline.caches[name] == "sliding"]
    states = [name for name, kind in outline.caches.items() if kind == "state"]
    notes = []
    if settings.container is None and plan.layout.scheme.containers[0] == "fp8":
        notes.append(
            "The container is compressed-tensors, since the fp8 one has no word for the cache of "
            "keys and values."
        )
    if sliding:
        notes.append(
            f"{len(sliding)} of {len(modules)} attention layers look back over a window only, such as "
            f"{sliding[0]}: their caches are FP8 too."
        )
    if states:
        notes.append(
            f"{len(states)} layers cache no keys and values, such as {states[0]}: what they keep stays as "
            "the server has it."
        )
    return notes
