"""What each tensor of a checkpoint is to its model: a Linear weight, an expert, a router, an embedding, ...

Two name spaces meet here. A model in memory has parameters such as `mlp.experts.gate_up_proj` (experts stacked in
three dimensions); its checkpoint has `mlp.experts.0.gate_proj.weight` and so on. Servers read the checkpoint's names.
transformers knows how to translate in both directions, and its own conversion is used for both, so that no list of
architectures has to be kept here.

Sources: transformers 5 `core_model_loading` (`revert_weight_conversion`, `rename_source_key`), PEFT 0.21 (names of
wrapped modules).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from daq_lightning.checkpoint.folder import read_json
from daq_lightning.checkpoint.tensor_file import CheckpointError

Role: TypeAlias = Literal["linear", "expert", "router", "head", "outside", "conv1d", "other"]
"""linear and expert weights can be quantized. head: lm_head, classifiers. outside: Linear weights that are not part
of the language model (vision tower, projector). conv1d: GPT-2's transposed Linear."""

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "wg")
_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")
# fields of a config.json that name code or a repository to fetch code from; none of them changes a tensor
_NAMES_CODE = re.compile(
    r"auto_map|custom_pipelines|trust_remote_code|code_revision|use_kernels|(_?name_or_path)|"
    r"_?(attn|experts)_implementation(_internal)?"
)
_COUNTS_MODULES = re.compile(r".*(layers?|depths?|experts|blocks|stages)")


class Architecture:
    """The modules of a model and the role of its tensors; holds no weights of its own.

    Args:
        model: A `PreTrainedModel` (also on the meta device, also with PEFT adapters inside) or any other module.

    Attributes:
        model: The model.
        linear_modules: Names of all Linear modules and routers, in memory names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_transformers = any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)
        self._modules = dict(_clean_modules(model))
        decoder = model.get_decoder() if self._has_one_decoder() else None  # type: ignore[operator]
        self._decoder = next((name for name, module in self._modules.items() if module is decoder), "")
        output = model.get_output_embeddings() if self.is_transformers else None  # type: ignore[operator]
        self._heads = {name for name, module in self._modules.items() if module is output and output is not None}
        self._conversion: _Conversion | None = None
        self.linear_modules = [
            name
            for name, module in self._modules.items()
            if isinstance(module, nn.Linear) or self._module_role(name) == "router"
        ]

    @classmethod
    def from_folder(cls, folder: Path, tensors: int) -> Architecture:
        """The architecture that a folder's config.json describes, built without memory for weights.

        A config.json is foreign input: nothing that it names is imported or downloaded, attention is the plain one,
        and a model of many more modules than the files hold tensors is not built.

        Args:
            folder: A Hugging Face model folder.
            tensors: How many tensors its files hold.

        Raises:
            CheckpointError: No config.json, or a model that transformers does not know.
        """
        import transformers

        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} has no config.json, which says what the tensors are: pass a Hugging Face model folder."
            )
        content = _without_code(read_json(folder / "config.json"))
        limit = 1000 + 16 * tensors
        try:
            _check_counts(content, limit)
            with _quiet_and_offline():
                config = _read_config(content, folder.name)
                names = config.architectures or []
                model_class = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
                if names and not issubclass(model_class, transformers.PreTrainedModel):
                    raise ValueError(f"{names[0]} is not a model class")
                # a quantized folder is described by its config too: the plain architecture is asked for here
                vars(config).pop("quantization_config", None)
                build = getattr(model_class, "_from_config" if names else "from_config")
                with torch.device("meta"), _at_most_modules(limit):
                    model = build(config, attn_implementation="eager")
                return cls(model)
        except Exception as error:  # foreign input: transformers raises whatever it trips over
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot build the model that {folder / 'config.json'} "
                f"describes: {error}. Models with code of their own are not supported."
            ) from error

    def keys_of(self, names: Iterable[str]) -> dict[str, str]:
        """Checkpoint names -> memory names, as transformers would load them; unknown names map to themselves."""
        if not self.is_transformers:
            return {name: name for name in names}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        known: dict[str, Any] = {
            name: True for key in self.model.state_dict() if (name := name_without_peft(key)) is not None
        }
        prefix = self.model.base_model_prefix
        keys = {}
        for name in names:
            key, _ = rename_source_key(name, renamings, converters, prefix, known)  # type: ignore[arg-type]
            if key not in known and name in known:
                key, _ = rename_source_key(name, [], [], prefix, known)  # type: ignore[arg-type]
            keys[name] = key
        return keys

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Parameters that a checkpoint of these memory names leaves at random values; tied ones are not missed."""
        if not self.is_transformers:
            return []
        present, tied = set(keys), self.ties
        present |= {key for key, source in tied.items() if source in present}
        present |= {source for key, source in tied.items() if key in present}
        patterns = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        optional = [re.compile(pattern) for pattern in patterns]
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return [name for name in names if name not in present and not any(pattern.search(name) for pattern in optional)]

    @property
    def ties(self) -> dict[str, str]:
        """Memory name of a tied copy -> of the tensor that it shares."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def has_module(self, name: str) -> bool:
        """Whether the model has a module of this memory name."""
        return name in self._modules

    def split(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """The checkpoint tensors of one tensor in memory: views of it, under checkpoint names."""
        if not self.is_transformers:
            return {key: tensor}
        if self._conversion is None:
            self._conversion = _Conversion(self.model)
        return self._conversion.revert({key: tensor})

    def saved(self, outlines: Mapping[str, Tensor], identities: Mapping[str, int]) -> dict[str, tuple[str, Tensor]]:
        """Everything that a save of the model would write; tied copies left out.

        Args:
            outlines: Memory name -> tensor on the meta device, in the order of the state dict.
            identities: Memory name -> a number that is equal for names of one tensor.

        Returns:
            Checkpoint name -> memory name and outline of the checkpoint's tensor.

        Raises:
            CheckpointError: A conversion needs several tensors at once, so it cannot be streamed.
        """
        declared = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        first: dict[int, str] = {}
        for key in sorted(outlines, key=lambda key: key in declared):
            first.setdefault(identities[key], key)
        # a reader ties what the model declares; names of one tensor that it does not know of are written each
        kept = (set(first.values()) | (set(outlines) - declared)) - ignored
        meta = {key: outline for key, outline in outlines.items() if key in kept}
        result = {name: (key, part) for key in meta for name, part in self.split(key, meta[key]).items()}
        if self._conversion is not None:
            odd = set(self._conversion.revert(meta)) ^ set(result)
            if odd:
                raise CheckpointError(
                    f"{type(self.model).__name__}: the checkpoint form of {', '.join(sorted(odd)[:4])} is made from "
                    "several tensors at once, which cannot be exported one at a time. Save the model with "
                    "save_pretrained and export that folder."
                )
        return result

    def role(self, key: str, ndim: int) -> Role:
        """The role of a tensor.

        Args:
            key: Memory name.
            ndim: Dimensions of the tensor in the checkpoint.
        """
        owner, _, parameter = key.rpartition(".")
        module = self._modules.get(owner)
        if module is None or ndim != 2:
            return "other"
        if parameter == "weight" and (isinstance(module, nn.Linear) or self._module_role(owner) == "router"):
            return self._module_role(owner)
        if type(module).__name__ == "Conv1D" and parameter == "weight":
            return "conv1d"
        in_memory = module._parameters.get(parameter)  # not getattr, which would compute a parametrized tensor
        if in_memory is not None and in_memory.ndim == 3:
            return "expert"
        return "other"

    def _has_one_decoder(self) -> bool:
        # the encoder of an encoder-decoder belongs to the language model as much as its decoder does
        if not self.is_transformers or not hasattr(self.model, "get_decoder"):
            return False
        return not getattr(self.model.config, "is_encoder_decoder", False)

    def _module_role(self, name: str) -> Role:
        module, leaf = self._modules[name], name.rpartition(".")[2]
        if "Router" in type(module).__name__ or (
            leaf in _ROUTER_NAMES and isinstance(module, nn.Linear) and self.is_transformers
        ):
            return "router"
        if not isinstance(module, nn.Linear):
            return "other"
        if name in self._heads or leaf in _HEAD_NAMES:
            return "head"
        if self._decoder and not name.startswith(self._decoder + "."):
            return "outside"
        return "linear"


class _Conversion:
    """transformers' own save conversion, for some tensors at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        used = getattr(self._model, "_weight_conversions", None)
        if not any(_dequantizes(conversion) for conversion in used or ()):
            return revert_weight_conversion(self._model, tensors)  # type: ignore[arg-type]
        # loaded from an FP8 folder and dequantized, which transformers 5.23 would revert by quantizing: without this
        # attribute it takes the conversions of the plain architecture
        del self._model._weight_conversions
        try:
            return revert_weight_conversion(self._model, tensors)  # type: ignore[arg-type]
        finally:
            self._model._weight_conversions = used  # type: ignore[assignment]


def _read_config(content: Mapping[str, Any], name: str) -> Any:
    """The configuration object of a config.json's content; transformers reads it from a folder of this name."""
    import transformers

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / (name or "model")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content), "utf-8")
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _without_code(content: Any) -> Any:
    """A config.json without the fields that name code, at any depth."""
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if not _NAMES_CODE.fullmatch(key)}
    return [_without_code(value) for value in content] if isinstance(content, list) else content


def _check_counts(content: Any, limit: int, key: str = "") -> None:
    """Refuses a config.json whose counts of layers and the like the files cannot bear out: building would not end."""
    if isinstance(content, dict):
        for name, value in content.items():
            _check_counts(value, limit, name)
    elif isinstance(content, list):
        for value in content:
            _check_counts(value, limit, key)
    elif isinstance(content, (int, float)) and content > limit and _COUNTS_MODULES.fullmatch(key):
        raise ValueError(f"{key} is {content:g}, far more than the tensors in its files")


@contextlib.contextmanager
def _at_most_modules(limit: int) -> Iterator[None]:
    """Stops a model that this thread builds when it has more modules than that."""
    thread, count = threading.get_ident(), 0

    def check(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError(f"it has more than {limit} modules, far more than the tensors in its files")

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """Without transformers' warnings, and without the Hub: a config.json may name repositories in many fields."""
    from huggingface_hub import constants

    logger = logging.getLogger("transformers")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _dequantizes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(operation).__name__.endswith("Dequantize") for operation in operations)


def owner_of(key: str) -> str:
    """The module that holds a tensor."""
    return key.rpartition(".")[0]


def name_without_peft(name: str) -> str | None:
    """The name that a module or tensor has without PEFT's wrappers; None for adapters and trained copies."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules under the names they have without PEFT: wrappers give way to what they wrap."""
    for name, module in model.named_modules():
        clean = name_without_peft(name)
        if clean is not None and not hasattr(module, "base_layer") and not hasattr(module, "original_module"):
            yield clean, module
