"""ModelPatchers for models whose patches stay apart: none enters a packed weight, or one in fp8."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import LazyCastingParam, ModelPatcher, ModelPatcherDynamic
from comfy.quant_ops import QuantizedTensor

from .low_rank import Patch, Patches, changes_nothing, factors_of, fits
from .pinning import StreamedStayPinned, has_dynamic_vram
from .quantized_ops import kernels_for
from .status import say
from .unmerged_linear import UnmergedLinear

KEY = "qwen_vram.patches"
LEAST = 0.1  # bytes: what the host asks for when nothing fits, since 0 stands for all there
NO_SAVING = (
    "This model is quantised, which ComfyUI's own saving nodes cannot write. Use Save Quantized "
    "Model (Qwen VRAM) instead."
)
NO_HOOKS = (
    "Scheduled LoRAs and other hooks cannot change quantised weights ({}). Use Load LoRA instead, "
    "or load the model with weight_dtype bf16 or fp8."
)


class _Unmerged:
    """What both patchers have in common; goes before the host's class."""

    @property
    def run_time_patches(self) -> Patches:
        """What LoRAs and others ask of these layers; clones share it."""
        return self.get_attachment(KEY) or Patches()

    def _layers(self) -> Iterator[tuple[str, UnmergedLinear]]:
        """(name of the weight, module) of every layer whose patches stay apart."""
        for name, module in self.model.named_modules():
            if isinstance(module, UnmergedLinear) and module.takes_patches:
                yield f"{name}.weight", module

    def _module(self, key: str | tuple[Any, ...]) -> UnmergedLinear | None:
        """The layer of these whose weight a patch is for, by the host's key, or None."""
        name, _, leaf = (key if isinstance(key, str) else key[0]).rpartition(".")
        if leaf != "weight":
            return None
        try:
            module = self.model.get_submodule(name)
        except AttributeError:  # the host, too, passes over what a model does not have
            return None
        return module if isinstance(module, UnmergedLinear) and module.takes_patches else None

    # ------------------------------------------------------------------------------- patches
    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As the host's: the keys that were found. Those of these layers are kept apart.

        But in fp8 only LoRAs: the host merges the rest, and what came before it.
        """
        rest, added, own = {}, [], []
        for key, value in patches.items():
            module = self._module(key)
            if module is None:
                rest[key] = value
                continue
            name, offset, function = (*([key] if isinstance(key, str) else key), None, None)[:3]
            patch = Patch(strength_patch, value, strength_model, offset, function)
            shape = tuple(module.weight.shape)
            own_way = not module.host_merges or factors_of(patch, shape) or changes_nothing(patch)
            if own_way or not fits(patch, shape, name):
                own.append(key)
                added.append((name, shape, patch))  # less what does not fit
            else:
                self._hand_over(name)
                rest[key] = value
        found = super().add_patches(rest, strength_patch, strength_model)
        if added:
            self.set_attachments(KEY, self.run_time_patches.plus(added))
        return [*found, *own]

    def _hand_over(self, key: str) -> None:
        """Give the host a layer's LoRAs, since a later patch may multiply what they added."""
        if (layer := self.run_time_patches.layers.get(key)) is not None:
            self.patches[key] = [*self.patches.get(key, []), *layer.patches]
            self.set_attachments(KEY, self.run_time_patches.without(key))

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
            own = [*self.patches.get(key, []), *(patches[key].patches if key in patches else [])]
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
        own = next((k for k in patches if not self._merged_by_host(k)), None)
        if own is not None:
            raise ValueError(NO_HOOKS.format(own if isinstance(own, str) else own[0]))
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def _merged_by_host(self, key: str | tuple[Any, ...]) -> bool:
        module = self._module(key)
        return module is None or module.host_merges

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
        """As the host's; a weight of these layers that is asked for comes with its patches.

        A quantised one dequantised, one in fp8 rounded to what the file has, as the host does.
        """
        if return_weight and not self._merged_by_host(key):
            return self.plain_weight(key, device_to)
        if return_weight and key in self.run_time_patches.layers:
            dense, held = self.plain_weight(key, device_to), self._module(key).weight.dtype
            seed = comfy.utils.string_to_seed(key)
            return comfy.float.stochastic_rounding(dense, held, seed=seed)
        return super().patch_weight_to_device(
            key, device_to, inplace_update, return_weight, force_cast
        )

    def plain_weight(self, key: str, device: torch.device | None = None) -> torch.Tensor:
        """A layer's weight (out, in) with all patches, as the file has it: not rounded to fp8."""
        dense = self._module(key).dense_weight(device)
        if key in self.patches and key not in self.backup:  # of the host's, and not merged yet
            dense = comfy.lora.calculate_weight(self.patches[key], dense.clone(), key)
        layer = self.run_time_patches.layers.get(key)
        return dense if layer is None else layer.apply(dense)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Any]:
        """As the host's, of fp8. Quantised layers it would dequantise, or write what it cannot
        read: ValueError.
        """
        self._refuse_saving()
        state = super().model_state_dict_for_saving(model, prefix)
        for key in self.run_time_patches.layers:  # the host takes what is loaded for patched
            if key.startswith(prefix) and key.removeprefix(prefix) in state:
                lazy = LazyCastingParam(self, key, self._module(key).weight)
                state[key.removeprefix(prefix)] = lazy
        return state

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As above."""
        self._refuse_saving()
        return super().state_dict_for_saving(*args, **kwargs)

    def _refuse_saving(self) -> None:
        if not all(module.host_merges for _, module in self._layers()):
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
            logging.info("Qwen VRAM: %s", report)
            say(report)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """As the host's; what the factors of LoRAs will take there is not free for weights.

        Weights that are there already make room for them. With dynamic VRAM the host does that
        when the factors come.
        """
        if not self.is_dynamic():
            need = bytes_to_come(self) - self._bytes_to_go()
            least = LEAST - self.loaded_size()  # all that is there goes
            extra_memory = max(extra_memory - need, min(extra_memory, least))
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def _bytes_to_go(self) -> int:
        """Of another patcher's factors, which leave when this one's patches come."""
        own = set(self.run_time_patches.layers.values())
        loaded = {module.layer for _, module in self._layers()} - own
        return sum(layer.resident_bytes(self.load_device) for layer in loaded if layer is not None)

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
            copy.__class__ = UnmergedPatcher
        return copy

    def _dtype(self) -> torch.dtype:
        """What the model computes in, and its LoRAs with it."""
        of_model = getattr(self.model, "manual_cast_dtype", None)
        dtype = self.object_patches.get("manual_cast_dtype", of_model)
        return dtype or next((m.weight.dtype for _, m in self._layers()), torch.bfloat16)


def _dequantized(weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """What the host calls on a weight before it merges with it."""
    if not isinstance(weight, QuantizedTensor):
        return weight
    with kernels_for(weight):
        return weight.dequantize()


class _PlainWeights(dict[str, Any]):
    """A state dict for nodes that extract differences: of each weight as it is asked for.

    All of them at once would be the plain model.
    """

    def __init__(self, patcher: _Unmerged, state: dict[str, Any]) -> None:
        super().__init__(state)
        self._patcher = patcher

    def __getitem__(self, key: str) -> Any:
        if self._patcher._module(key) is None:
            return super().__getitem__(key)
        return self._patcher.plain_weight(key)


class UnmergedPatcher(_Unmerged, ModelPatcher):
    """The host's patcher for models whose patches stay apart."""


class UnmergedDynamicPatcher(_Unmerged, StreamedStayPinned, ModelPatcherDynamic):
    """The host's patcher with dynamic VRAM for models whose patches stay apart."""

    def __new__(
        cls, model: Any = None, load_device: Any = None, *args: Any, **kwargs: Any
    ) -> ModelPatcher:
        """On a CPU, as in the host, a plain one, but of this kind."""
        if load_device is not None and comfy.model_management.is_device_cpu(load_device):
            return UnmergedPatcher(model, load_device, *args, **kwargs)
        return super().__new__(cls, model, load_device, *args, **kwargs)


def patcher_for(
    model: Any,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a model that was built with the operations of quantized_ops or fp8_ops."""
    kind = UnmergedDynamicPatcher if has_dynamic_vram(disable_dynamic) else UnmergedPatcher
    return kind(model, load_device=load_device, offload_device=offload_device)


def lora_report(patcher: ModelPatcher) -> str:
    """One line: how LoRAs and other patches of these layers are applied; "" without any."""
    return patcher.run_time_patches.report(patcher._dtype()) if is_unmerged(patcher) else ""


def lora_bytes(patcher: ModelPatcher) -> tuple[int, int]:
    """Bytes of the factors of its LoRAs: on its device now, and when all are there."""
    if not is_unmerged(patcher):
        return 0, 0
    layers, dtype = list(patcher.run_time_patches.layers.values()), patcher._dtype()
    now = sum(layer.resident_bytes(patcher.load_device) for layer in layers)
    return now, sum(layer.bytes_of(dtype) for layer in layers)


def bytes_to_come(patcher: ModelPatcher) -> int:
    """Bytes of factors of LoRAs that the next pass brings to its device."""
    now, then = lora_bytes(patcher)
    return max(0, then - now)


def is_unmerged(patcher: ModelPatcher) -> bool:
    """Whether a patcher is one of these."""
    return isinstance(patcher, _Unmerged)
