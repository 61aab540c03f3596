"""How an export is served, which servers keep which scales, and how it was made: paragraphs of its card.

Only what was seen with tiny models (vLLM 0.32, transformers 5.23) or read in their code is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.readers import TRANSFORMERS, VLLM
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.report.figures import ExportReport
    from daq_lightning.report.kv_cache import CacheReport

_COMMANDS = """`MODEL` is this folder, or its name on the Hub.

```bash
vllm serve MODEL
python -m sglang.launch_server --model-path MODEL
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```"""
_CACHE = (
    "Keys and values are cached in FP8 (E4M3), with the `k_scale` and `v_scale` of each attention layer. "
    "vLLM does that unasked, since `kv_cache_scheme` is in config.json; `--kv-cache-dtype fp8` says it, and "
    "`--kv-cache-dtype bfloat16` leaves them in 16 bit. transformers rounds keys and values to FP8 likewise; "
    "loaded with `quantization_config=CompressedTensorsConfig(dequantize=True)`, it leaves them in 16 bit."
)
_DEEP_GEMM = (
    "With DeepGEMM on Hopper and Blackwell GPUs vLLM may round the scales of blocks to powers of two when it "
    "loads them (`VLLM_USE_DEEP_GEMM_E8M0=1` is its default), which undoes the search; an export with "
    "`--scale-format ue8m0` is not changed by that."
)
_SCALES = {
    "float32": "vLLM and transformers both keep the float32 scales as they are.",
    "e4m3": "The scales are values of E4M3, divided by one power of two for all weights that servers fuse: "
    "vLLM and transformers hold the same values.",
    "bfloat16": "transformers casts the scales to bfloat16, vLLM keeps float32. All scales are numbers of "
    "bfloat16, so both hold the same values.",
    "ue8m0": "The scales are powers of two, which no server changes that rounds scales to them (vLLM with "
    "DeepGEMM on Hopper and Blackwell GPUs).",
}


def serving(layouts: Sequence[Layout], has_config: bool, kv_cache: CacheReport | None = None) -> str:
    """How to serve an export.

    Args:
        layouts: How weights are stored.
        has_config: Whether it has a config.json; without one, no server loads it.
        kv_cache: The scales of the FP8 cache, if it has some.
    """
    commands = _COMMANDS
    if kv_cache is not None:
        commands = commands.replace("vllm serve MODEL\n", "vllm serve MODEL --kv-cache-dtype fp8\n")
        commands += f"\n\n{_CACHE}"
    if not has_config:
        commands = (
            "These are weights without a config.json, as they were exported from a mapping: servers need the "
            "model's own config.json, with the `quantization_config` of `daq_manifest.json`, and its "
            "tokenizer."
        )
    scales = " ".join(dict.fromkeys(map(_of_scales, layouts)))
    if len(layouts) > 1:
        scales += (
            " Several schemes are config groups of one checkpoint: transformers loads it as it is, not with "
            "`dequantize=True`."
        )
    return (
        f"{commands}\n\n{scales} What SGLang does with scales was not looked at.\n\n"
        "Do not call `save_pretrained` on this model once it is loaded: that quantizes it anew. "
        "`daq-lightning verify MODEL` checks the files against what servers need."
    )


def _of_scales(layout: Layout) -> str:
    """What readers make of the scales of a layout."""
    scheme, scales = layout.scheme, _SCALES[layout.scale_format]
    if scheme.scale_format == "ue8m0":
        scales = "The scales are powers of two, as the format has them."
    elif scheme.code.startswith("int") and layout.scale_format == "bfloat16":
        scales = "The scales are stored in bfloat16, which vLLM and transformers both hold."
    if isinstance(layout.granularity, PerBlock) and not scheme.group and layout.scale_format != "ue8m0":
        scales += f" {_DEEP_GEMM}"
    return " ".join(filter(None, (scales, VLLM.get(scheme.name), TRANSFORMERS.get(scheme.name))))


def creation(report: ExportReport, *, recipe: bool, trained: bool) -> str:
    """What makes the export again.

    Args:
        report: Of the export.
        recipe: Whether there is a recipe.yaml.
        trained: Whether the callback made it.
    """
    if recipe:
        return (
            "Made from two folders by `daq-lightning quantize`. `recipe.yaml` holds all options; in this "
            "folder, with those models where it says, this makes the same files:\n\n"
            "```bash\ndaq-lightning quantize --config recipe.yaml\n```"
        )
    curved = any(tensor.rounding is not None for tensor in report.tensors)
    scheme = f"scheme={report.scheme!r}"
    if report.placement is not None:
        rungs = max((group.losses for group in report.placement.groups), key=len)
        scheme = f"scheme={next(iter(rungs))!r},\n    budget={report.placement.budget!r}"
    rounding = '    rounding="curvature",\n' if curved else ""
    search = "".join(f"        {name}={value!r},\n" for name, value in report.search.items())
    if report.kv_cache is not None:
        calibrated, text = report.kv_cache.calibrated, "" if trained else "    kv_text=kv_text,\n"
        rounding += '    kv_cache="fp8-calibrated",\n' + text if calibrated else '    kv_cache="fp8",\n'
    if not trained:
        return (
            "Made in Python:\n\n```python\nfrom daq_lightning import ScaleSearch, "
            "export_checkpoint\n\nexport_checkpoint(\n    weights,\n    base,\n    out,\n"
            f"    {scheme},\n    search=ScaleSearch(\n{search}    ),\n{rounding})\n```"
        )
    return (
        "Made in training, by a callback of Lightning:\n\n```python\nfrom daq_lightning import "
        "DeltaAwareQuantization, ScaleSearch\n\nexport = DeltaAwareQuantization(\n"
        f"    {scheme},\n    search=ScaleSearch(\n{search}    ),\n{rounding})\n"
        "trainer = L.Trainer(..., callbacks=[export])\n```"
    )
