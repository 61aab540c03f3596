"""Which readers load which scheme: data for plans, cards and docs.

Seen: tiny Llama, Qwen2, Phi3, Qwen3-MoE and Mixtral models in every scheme, loaded by transformers 5.23 with
compressed-tensors 0.20 on a CPU; FP8, W8A8 and W4A16 by vLLM 0.32 on a CPU. For a GPU of compute capability
9.0 the loader of vLLM 0.33 was run without one: it chose its scheme for each layer of a Llama and of a
Qwen3-MoE and put every tensor where it belongs, byte for byte. No kernel ran. Families of models:
`benchmarks.families`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

from daq_lightning.checkpoint.tensor_file import CheckpointError

_DEQUANTIZED = (
    "transformers 5.23 loads {0} only dequantized: "
    "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))."
)
TRANSFORMERS: Mapping[str, str] = {
    "W4A16_ASYM": _DEQUANTIZED.format("W4A16_ASYM"),
    "W4A16_ASYM_G32": _DEQUANTIZED.format("W4A16_ASYM_G32"),
}
"""Scheme -> what to know before loading a dense model in transformers; any other loads as it is."""

_GPU = "vLLM 0.33 loads {0} for a GPU (its loader was run, its kernels were not)."
_CPU = "vLLM 0.32 loads {0} on a CPU, and vLLM 0.33 for a GPU (its loader was run, its kernels were not)."
VLLM: Mapping[str, str] = {
    "MXFP8": _GPU.format("MXFP8"),
    "W8A8": _CPU.format("W8A8"),
    "W4A16": _CPU.format("W4A16"),
    "W4A16_ASYM": _GPU.format("W4A16_ASYM"),
    "W4A16_G32": _GPU.format("W4A16 in groups of 32"),
    "W4A16_ASYM_G32": _GPU.format("W4A16_ASYM in groups of 32"),
    "NVFP4A16": _GPU.format("NVFP4A16"),
    "MXFP4A16": _GPU.format("MXFP4A16"),
}
"""Scheme -> where vLLM loads a dense model of it."""

ACTIVATIONS: Mapping[str, str] = {
    "MXFP4A16": "vLLM 0.33 with FlashInfer on Blackwell (compute capability 10 and up) rounds activations of "
    "MXFP4A16 to four bits as well, and loses more than the figures here say; elsewhere it keeps them in "
    "16 bit, as it does for NVFP4A16 (read in its code, not run).",
}
"""Scheme -> where a reader computes with fewer bits than the scheme says."""

_NOT_EXPERTS = (
    "transformers 5.23 cannot load {0} of a mixture-of-experts model; vLLM 0.33 does for a GPU (its kernels "
    "were not run). FP8_BLOCK and W4A16 load in both."
)
_EXPERTS_TOO = (
    "{0} of a mixture-of-experts model loads in transformers, and in vLLM 0.33 for a GPU (its kernels were "
    "not run)."
)
EXPERTS: Mapping[str, str] = {
    "FP8_DYNAMIC": "{0} of a mixture-of-experts model loads in transformers and in vLLM on a GPU; vLLM on a "
    "CPU has no backend for it. FP8_BLOCK loads in all of them.",
    "FP8A16": "{0} of a mixture-of-experts model loads in transformers; vLLM refuses it, since it has no "
    "experts in FP8 with 16-bit activations. FP8_BLOCK loads in both, and FP8_DYNAMIC in vLLM on a GPU.",
    "MXFP8": _NOT_EXPERTS,
    "W8A8": _NOT_EXPERTS,
    "W4A16_ASYM": _NOT_EXPERTS,
    "W4A16_ASYM_G32": _NOT_EXPERTS,
    "W4A16": _EXPERTS_TOO,
    "W4A16_G32": _EXPERTS_TOO,
    "MXFP4A16": _EXPERTS_TOO,
    "NVFP4A16": "transformers 5.23 reads the experts of NVFP4A16 without their global scale and computes "
    "garbage, without an error: serve this model with vLLM, whose 0.33 loads it for a GPU (its kernels were "
    "not run). W4A16 loads in both.",
}
"""Scheme -> what to know of a mixture of experts in it."""
_LLAMA4 = (
    "transformers 5.23 does not load Llama 4 from the compressed-tensors container, where it looks for each "
    "expert in a tensor of its own: use FP8_BLOCK, or serve this model with vLLM, which has code for it (not "
    "run)."
)
_JOINED_CONVOLUTIONS = (
    "transformers 5.23 does not load {0} of this model, whose convolutions it joins from three tensors: use "
    "FP8_DYNAMIC, or serve this model with vLLM, which has code for it (not run)."
)
MODELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Llama4ForCausalLM": (_LLAMA4, ()),
    "Llama4ForConditionalGeneration": (_LLAMA4, ()),
    "KimiLinearForCausalLM": (_JOINED_CONVOLUTIONS, ("pack-quantized",)),
    "OlmoHybridForCausalLM": (_JOINED_CONVOLUTIONS, ("pack-quantized",)),
}
"""Class -> what to know before loading it from compressed-tensors, and of which formats; () for all."""


def notes_on_readers(scheme: str, form: str, *, experts: bool, model: str = "") -> list[str]:
    """What somebody who exports a model should know of its readers.

    Args:
        scheme: By name.
        form: How compressed-tensors calls the way it is stored; "" in another container.
        experts: Whether the model has any that are quantized.
        model: Name of its class.

    Example:
        >>> notes_on_readers("FP8_BLOCK", "", experts=True)
        []
    """
    told = [EXPERTS[scheme].format(scheme)] if experts and form and scheme in EXPERTS else []
    if form and scheme in ACTIVATIONS:
        told.append(ACTIVATIONS[scheme])
    if scheme in TRANSFORMERS and not experts:
        told.append(TRANSFORMERS[scheme])
    if form and model in MODELS:
        words, forms = MODELS[model]
        told += [words.format(scheme)] if not forms or form in forms else []
    if form and not installed_readers_know(form):
        version = metadata.version("compressed-tensors")
        told.append(
            f"The compressed-tensors {version} that is installed here does not know {form}: transformers on "
            "this machine will not load the export. Update it: pip install -U compressed-tensors."
        )
    return told


def notes_on_mixed(schemes: Sequence[str], of_experts: Sequence[str]) -> list[str]:
    """What somebody who exports several schemes in one checkpoint should know of its readers.

    Args:
        schemes: All, by name.
        of_experts: Those of experts; "16" for some that are kept.
    """
    if len(schemes) < 2:
        return []
    told = [
        f"{' and '.join(schemes)} in one checkpoint: transformers 5.23 loads it as it is, but not with "
        "dequantize=True, which takes one of the schemes for all weights."
    ]
    told += [
        f"transformers 5.23 loads {scheme} only dequantized, so not beside another scheme: serve this model "
        f"with vLLM, or use {scheme.replace('_ASYM', '')}."
        for scheme in schemes
        if scheme in TRANSFORMERS
    ]
    if len(of_experts) > 1:
        told.append(
            "transformers 5.23 takes one scheme for the experts of all layers and computes garbage from "
            f"{' and '.join(of_experts)}, without an error: serve this model with vLLM, which has code for "
            "it (not run)."
        )
    return told


def installed_readers_know(form: str) -> bool:
    """Whether the compressed-tensors of this machine, if there is one, knows a way of storing.

    Its list of formats is looked up as text: importing it takes seconds.
    """
    found = util.find_spec("compressed_tensors")
    if found is None or found.origin is None:
        return True
    try:
        listed = (Path(found.origin).parent / "config" / "base.py").read_text("utf-8")
    except OSError:  # of another structure, of which nothing is known
        return True
    return f'"{form}"' in listed


def check_readable(scheme: str, container: str, *, blocks: bool, experts: bool) -> None:
    """Raises CheckpointError for what is known to load nowhere."""
    if experts and blocks and container != "fp8":
        raise CheckpointError(
            f"transformers cannot load mixture-of-experts models with compressed-tensors blocks ({scheme}): "
            "use the fp8 container of FP8_BLOCK."
        )
