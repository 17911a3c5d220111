"""ModelPatchers for models with quantised layers: no patch enters a packed weight."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from comfy.quant_ops import QuantizedTensor

from .low_rank import Patch, Patches
from .quantized_ops import QuantizedLinear
from .status import say

KEY = "qwen_vram.patches"
LEAST = 0.1  # bytes: what the host asks for when nothing fits; below 0 it would unload
NO_SAVING = (
    "This model is quantised, which ComfyUI's own saving nodes cannot write. Use Save Quantized "
    "Model (Qwen VRAM) instead."
)
NO_HOOKS = (
    "Scheduled LoRAs and other hooks cannot change quantised weights ({}). Use Load LoRA instead, "
    "or load the model with weight_dtype bf16 or fp8."
)


class _Quantized:
    """What both patchers have in common; goes before the host's class."""

    @property
    def run_time_patches(self) -> Patches:
        """What LoRAs and others ask of quantised layers; clones share it."""
        return self.get_attachment(KEY) or Patches()

    def _layers(self) -> Iterator[tuple[str, QuantizedLinear]]:
        """(name of the weight, module) of every quantised layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedLinear) and module.is_quantized:
                yield f"{name}.weight", module

    def _module(self, key: str | tuple[Any, ...]) -> QuantizedLinear | None:
        """The quantised layer whose weight a patch is for, by the host's key, or None."""
        name, _, leaf = (key if isinstance(key, str) else key[0]).rpartition(".")
        if leaf != "weight":
            return None
        try:
            module = self.model.get_submodule(name)
        except AttributeError:  # the host, too, passes over what a model does not have
            return None
        return module if isinstance(module, QuantizedLinear) and module.is_quantized else None

    # ------------------------------------------------------------------------------- patches
    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As the host's: the keys that were found. Those of quantised weights are kept apart."""
        own = {k: m for k in patches if (m := self._module(k)) is not None}
        rest = {k: v for k, v in patches.items() if k not in own}
        found = super().add_patches(rest, strength_patch, strength_model)
        added = []
        for key, module in own.items():
            name, offset, function = (*([key] if isinstance(key, str) else key), None, None)[:3]
            patch = Patch(strength_patch, patches[key], strength_model, offset, function)
            added.append((name, tuple(module.weight.shape), patch))
        if added:
            self.set_attachments(KEY, self.run_time_patches.plus(added))
        return [*found, *own]

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """As the host's, of every parameter: what merging nodes take from this model.

        The host's own asks for `scale` and other entries as if they were parameters, and fails.
        """
        patches = self.run_time_patches.layers
        found = {}
        for key in self._keys(filter_prefix):
            weight, _, convert = comfy.model_patcher.get_key_weight(self.model, key)
            backup, hooked = self.backup.get(key), self.hook_backup.get(key)
            weight = weight if backup is None else backup.weight
            weight = weight if hooked is None else hooked[0]
            own = patches[key].patches if key in patches else self.patches.get(key, [])
            quantized = isinstance(weight, QuantizedTensor)
            convert = _dequantized if quantized or convert is None else convert
            found[key] = [(weight, convert), *own]
        return found

    def _keys(self, prefix: str | None) -> list[str]:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        present = self.model_state_dict(prefix)
        return [name for name, _ in named if name in present]

    def clone_has_same_weights(self, clone: ModelPatcher, allow_multigpu: bool = False) -> bool:
        """As the host's, by these patches too."""
        same = clone.get_attachment(KEY) is self.get_attachment(KEY)
        return same and bool(super().clone_has_same_weights(clone, allow_multigpu))

    def add_hook_patches(
        self,
        hook: Any,
        patches: dict[Any, Any],
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
    ) -> list[Any]:
        """As the host's, for what is not quantised. Raises ValueError, a sentence, for the rest."""
        own = next((k for k in patches if self._module(k) is not None), None)
        if own is not None:
            raise ValueError(NO_HOOKS.format(own if isinstance(own, str) else own[0]))
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    # ------------------------------------------------------------------------- plain weights
    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """As the host's; who takes the weight of a quantised layer by its name gets numbers."""
        return _PlainWeights(self, super().model_state_dict(filter_prefix))

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:
        """As the host's; a quantised weight that is asked for comes dequantised and patched."""
        if return_weight and self._module(key) is not None:
            return self.plain_weight(key, device_to)
        return super().patch_weight_to_device(
            key, device_to, inplace_update, return_weight, force_cast
        )

    def plain_weight(self, key: str, device: torch.device | None = None) -> torch.Tensor:
        """A quantised layer's weight (out, in) as the model computes with it, patches included."""
        weight = self._module(key).weight
        dense = (weight if device is None else weight.to(device)).dequantize()
        layer = self.run_time_patches.layers.get(key)
        return dense if layer is None else layer.apply(dense)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Any]:
        """Refused: the host would dequantise every layer, or write what it cannot read."""
        raise ValueError(NO_SAVING)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refused, as above."""
        raise ValueError(NO_SAVING)

    # ------------------------------------------------------------------------------- loading
    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        """As the host's; then the modules take this patcher's patches instead of another's.

        How they are applied is said in the console and on the node that runs.
        """
        super().load(device_to, *args, **kwargs)
        patches = self.run_time_patches
        for key, module in self._layers():
            module.patch_with(patches.layers.get(key), self.load_device)
        if report := patches.report(self._dtype()):
            logging.info("Quantised layers: %s", report)
            say(report)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """As the host's; what the factors of LoRAs will take there is not free for weights.

        With dynamic VRAM the host makes room for them when they come.
        """
        if not self.is_dynamic():
            layers = self.run_time_patches.layers.values()
            need = sum(layer.bytes_of(self._dtype()) for layer in layers)
            need -= sum(layer.resident_bytes(device_to) for layer in layers)
            extra_memory = max(extra_memory - need, min(extra_memory, LEAST))
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def partially_unload(
        self, device_to: torch.device | None, memory_to_free: float = 0, *args: Any, **kwargs: Any
    ) -> int:
        """As the host's; if that is not enough, the factors go too, until they are used again."""
        freed = super().partially_unload(device_to, memory_to_free, *args, **kwargs)
        return freed + self._drop() if freed < memory_to_free else freed

    def cleanup(self) -> None:
        """As the host's, at the end of a run.

        With dynamic VRAM it cannot ask for the factors' memory: what comes next shall have it.
        """
        super().cleanup()
        if self.is_dynamic():
            self._drop()

    def _drop(self) -> int:
        """Forget the factors' copies on the device, until they are used again; their bytes."""
        layers = [module.layer for _, module in self._layers()]
        return sum(layer.drop(self.load_device) for layer in layers if layer is not None)

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True
    ) -> None:
        """As the host's; with the weights' patches go these, and their copies on the device."""
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for _, module in self._layers():
                module.patch_with(None, self.load_device)

    def clone(self, disable_dynamic: bool = False, *args: Any, **kwargs: Any) -> ModelPatcher:
        """As the host's, which makes its own plain class of a clone without dynamic VRAM."""
        copy = super().clone(disable_dynamic, *args, **kwargs)
        if type(copy) is ModelPatcher:
            copy.__class__ = QuantizedPatcher
        return copy

    def _dtype(self) -> torch.dtype:
        """What the model computes in, and its LoRAs with it."""
        of_model = getattr(self.model, "manual_cast_dtype", None)
        dtype = self.object_patches.get("manual_cast_dtype", of_model)
        return dtype or next((m.weight.dtype for _, m in self._layers()), torch.bfloat16)


def _dequantized(weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """What the host calls on a weight before it merges with it."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


class _PlainWeights(dict[str, Any]):
    """A state dict for nodes that extract differences: of each weight as it is asked for.

    All of them at once would be the plain model.
    """

    def __init__(self, patcher: _Quantized, state: dict[str, Any]) -> None:
        super().__init__(state)
        self._patcher = patcher

    def __getitem__(self, key: str) -> Any:
        if self._patcher._module(key) is None:
            return super().__getitem__(key)
        return self._patcher.plain_weight(key)


class QuantizedPatcher(_Quantized, ModelPatcher):
    """The host's patcher for models with quantised layers."""


class QuantizedDynamicPatcher(_Quantized, ModelPatcherDynamic):
    """The host's patcher with dynamic VRAM for models with quantised layers."""

    def __new__(
        cls, model: Any = None, load_device: Any = None, *args: Any, **kwargs: Any
    ) -> ModelPatcher:
        """On a CPU, as in the host, a plain one, but of this kind."""
        if load_device is not None and comfy.model_management.is_device_cpu(load_device):
            return QuantizedPatcher(model, load_device, *args, **kwargs)
        return super().__new__(cls, model, load_device, *args, **kwargs)


def patcher_for(
    model: Any,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a model that was built with quantized_ops.operations."""
    dynamic = issubclass(comfy.model_patcher.CoreModelPatcher, ModelPatcherDynamic)
    kind = QuantizedDynamicPatcher if dynamic and not disable_dynamic else QuantizedPatcher
    return kind(model, load_device=load_device, offload_device=offload_device)


def lora_report(patcher: ModelPatcher) -> str:
    """One line: how LoRAs and other patches of quantised layers are applied; "" without any."""
    return patcher.run_time_patches.report(patcher._dtype()) if is_quantized(patcher) else ""


def is_quantized(patcher: ModelPatcher) -> bool:
    """Whether a patcher is one of these."""
    return isinstance(patcher, _Quantized)
