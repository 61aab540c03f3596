"""What each tensor of a checkpoint is to its model: a Linear weight, an expert, a router, an embedding, ...

Two name spaces meet here. A model in memory has parameters such as `mlp.experts.gate_up_proj` (experts
stacked in three dimensions); its checkpoint has `mlp.experts.0.gate_proj.weight` and so on. Servers read the
checkpoint's names. transformers knows how to translate in both directions, and its own conversion is used for
both, so that no list of architectures has to be kept here.

Sources: transformers 5 `core_model_loading` (`revert_weight_conversion`, `rename_source_key`), PEFT 0.21
(names of wrapped modules).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.attention import cache_kinds
from daq_lightning.model.outline import CacheKind, Outline, Role, owner_of
from daq_lightning.model.placeholders import is_unit, state_names, unwrapped
from daq_lightning.model.served import kept_by_readers

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "wg")
_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")


class Architecture:
    """The modules of a model and the role of its tensors; holds no weights of its own.

    Args:
        model: A `PreTrainedModel` (also on the meta device, also with PEFT adapters) or any other module.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_transformers = any(
            cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__
        )
        self._modules = dict(_clean_modules(model))
        decoder = model.get_decoder() if self._has_one_decoder() else None  # type: ignore[operator]
        self._decoder = next((name for name, module in self._modules.items() if module is decoder), "")
        output = model.get_output_embeddings() if self.is_transformers else None  # type: ignore[operator]
        self._heads = {
            name for name, module in self._modules.items() if module is output and output is not None
        }
        self._conversion: _Conversion | None = None

    def module_of(self, key: str) -> nn.Module | None:
        """The module that holds a tensor, under its memory name."""
        return self._modules.get(owner_of(key))

    def linear_modules(self) -> list[nn.Linear]:
        """All Linear modules, in the model's order."""
        return [module for module in self._modules.values() if isinstance(module, nn.Linear)]

    def outline(self, keys: Mapping[str, str]) -> Outline:
        """The names and roles alone, see `Outline`.

        Args:
            keys: Checkpoint name -> memory name, of `keys_of` or of `saved`.
        """
        named = self.model.named_parameters(remove_duplicate=False)
        parameters = {unwrapped(name): parameter for name, parameter in named}
        once = {unwrapped(name) for name, _ in self.model.named_parameters()}
        return Outline(
            model=class_of(self.model).__name__,
            is_transformers=self.is_transformers,
            parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
            copies=tuple(name for name in parameters if name not in once),
            tensors=frozenset(state_names(self.model)),
            modules=frozenset(self._modules),
            linear_modules=tuple(name for name in self._modules if self._is_linear(name)),
            roles=self._roles(),
            ties=self.ties,
            may_lack=tuple(sorted(getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ())),
            may_add=tuple(sorted(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())),
            caches=self._caches(),
            keys=dict(keys),
        )

    def modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Some modules, by their names in memory."""
        return {name: self._modules[name] for name in names}

    def keys_of(self, names: Iterable[str]) -> dict[str, str]:
        """Checkpoint names -> memory names, as transformers loads them; unknown names map to themselves."""
        if not self.is_transformers:
            return {name: name for name in names}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        known: dict[str, Any] = {
            name: True for key in state_names(self.model) if (name := name_without_peft(key)) is not None
        }
        prefix = self.model.base_model_prefix
        keys = {}
        for name in names:
            key, _ = rename_source_key(name, renamings, converters, prefix, known)  # type: ignore[arg-type]
            if key not in known and name in known:
                key, _ = rename_source_key(name, [], [], prefix, known)  # type: ignore[arg-type]
            keys[name] = key
        return keys

    @property
    def ties(self) -> dict[str, str]:
        """Memory name of a tied copy -> of the tensor that it shares."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def split(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """The checkpoint tensors of one tensor in memory: views of it, under checkpoint names."""
        if not self.is_transformers:
            return {key: tensor}
        if self._conversion is None:
            self._conversion = _Conversion(self.model)
        return self._conversion.revert({key: tensor})

    def saved(
        self, outlines: Mapping[str, Tensor], identities: Mapping[str, int]
    ) -> dict[str, tuple[str, Tensor]]:
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
                    f"{class_of(self.model).__name__}: the checkpoint form of "
                    f"{', '.join(sorted(odd)[:4])} is made from several tensors at once, which cannot be "
                    "exported one at a time. Save the model with save_pretrained and export that folder."
                )
        return result

    def _roles(self) -> dict[str, Role]:
        """Matrix, or stack of matrices, in memory -> its role, if it has one."""
        roles: dict[str, Role] = {}
        for name, module in self._modules.items():
            prefix = f"{name}." if name else ""
            for (
                parameter,
                value,
            ) in module._parameters.items():  # not getattr, which would compute a parametrized one
                if value is not None and value.ndim == 3 and _holds_experts(name, module):
                    roles[prefix + parameter] = "expert"
            if self._is_linear(name):
                roles[f"{prefix}weight"] = self._module_role(name)
            elif type(module).__name__ == "Conv1D":
                roles[f"{prefix}weight"] = "conv1d"
        return roles

    def _caches(self) -> dict[str, CacheKind]:
        if not self.is_transformers:
            return {}
        two = bool(getattr(self.model.config, "is_encoder_decoder", False))
        return cache_kinds(self._modules, encoder_decoder=two)

    def _is_linear(self, name: str) -> bool:
        return isinstance(self._modules[name], nn.Linear) or self._module_role(name) == "router"

    def _has_one_decoder(self) -> bool:
        # the encoder of an encoder-decoder belongs to the language model as much as its decoder does
        if not self.is_transformers or not hasattr(self.model, "get_decoder"):
            return False
        return not getattr(self.model.config, "is_encoder_decoder", False)

    def _module_role(self, name: str) -> Role:
        module, leaf = self._modules[name], name.rpartition(".")[2]
        parent = self._modules.get(owner_of(name))
        if "Router" in type(module).__name__ or (
            isinstance(module, nn.Linear)
            and self.is_transformers
            and (leaf in _ROUTER_NAMES or "Router" in type(parent).__name__)
        ):
            return "router"
        if not isinstance(module, nn.Linear):
            return "other"
        if name in self._heads or leaf in _HEAD_NAMES:
            return "head"
        if self._decoder and not name.startswith(self._decoder + "."):
            return "outside"
        kept = kept_by_readers(self.model, name, parent) if self.is_transformers else None
        return kept or "linear"


class _Conversion:
    """transformers' own save conversion, for some tensors at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        used = getattr(self._model, "_weight_conversions", None)
        if not any(_dequantizes(conversion) for conversion in used or ()):
            return revert_weight_conversion(self._model, tensors)  # type: ignore[arg-type]
        # loaded from an FP8 folder and dequantized, which transformers 5.23 would revert by quantizing:
        # without this attribute it takes the conversions of the plain architecture
        del self._model._weight_conversions
        try:
            return revert_weight_conversion(self._model, tensors)  # type: ignore[arg-type]
        finally:
            self._model._weight_conversions = used  # type: ignore[assignment]


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that a model was made from; FSDP2 gives a sharded one a class of its own."""

    def of_fsdp(kind: type) -> bool:
        return any(base.__name__ == "FSDPModule" for base in kind.__mro__)

    return next(kind for kind in type(model).__mro__ if not of_fsdp(kind))


def _holds_experts(name: str, module: nn.Module) -> bool:
    return "expert" in f"{name} {type(module).__name__}".lower()


def _dequantizes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(operation).__name__.endswith("Dequantize") for operation in operations)


def name_without_peft(name: str) -> str | None:
    """The name that a module or tensor has without PEFT's wrappers; None for adapters and trained copies."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules under the names they have without PEFT: wrappers give way to what they wrap."""
    for name, module in model.named_modules():
        clean = name_without_peft(unwrapped(name))
        wrapper = is_unit(module) or hasattr(module, "base_layer") or hasattr(module, "original_module")
        if clean is not None and not wrapper:
            yield clean, module
