"""Which pins a model gives up when ComfyUI may pin no more: those of weights that lie in VRAM.

ComfyUI (0.33) pins at most 40 % of the RAM, on Linux RAM and swap less 16 GiB if that is more.
Beyond that idle models give up pins; then the one that runs does, of its streamed weights first,
which are pinned again at their next use, for which others give up theirs: with 12 GB of VRAM and
14 GiB to pin, of the fp8 file (20.4 GB) some 5 GB in every pass, although the 9.8 GB that stream
would fit. (See free_registrations in comfy.model_management; the figures are computed with
ComfyUI's own functions, in test_pinning.py; seconds: RESULTS.md, "Pinned RAM".) A weight that lies
in VRAM needs no pin until it has to be loaded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic

WEIGHTS = ("weights-loaded", "weights")  # the host's names; the first were in VRAM when pinned
LOADED = "-loaded"  # how the names of such end
EVERY = ("weights-loaded", "patches-loaded", "weights", "patches")  # what the host takes by default


class StreamedStayPinned:
    """Goes before the host's patcher with dynamic VRAM."""

    def unregister_inactive_pins(
        self, ram_to_unload: int, subsets: Sequence[str] = EVERY, *args: Any, **kwargs: Any
    ) -> int:
        """As the host's: the bytes that were unregistered; of what lies in VRAM first."""
        freed = self._unregister_resident(ram_to_unload, subsets)
        if freed >= ram_to_unload:
            return freed
        order = sorted(subsets, key=lambda name: not name.endswith(LOADED))
        rest = ram_to_unload - freed
        return freed + super().unregister_inactive_pins(rest, order, *args, **kwargs)

    def _unregister_resident(self, wanted: int, subsets: Sequence[str]) -> int:
        freed = 0
        for own, pinned in self._resident_pins(subsets):
            if freed >= wanted:
                break
            size = own["pin"].nbytes
            if torch.cuda.cudart().cudaHostUnregister(own["pin"].data_ptr()) != 0:
                mm.discard_cuda_async_error()
                continue
            own["registered"] = False
            mm.TOTAL_PINNED_MEMORY = max(0, mm.TOTAL_PINNED_MEMORY - size)
            pinned[0] = max(0, pinned[0] - size)
            freed += size
        return freed

    def _resident_pins(self, subsets: Sequence[str]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Registered pins of weights that lay in VRAM at their last use, the newest first.

        With them what the host counts of their subset. A weight that was streamed has no signature.
        """
        state = self.model.dynamic_pins[self.load_device]
        for name in (name for name in WEIGHTS if name in subsets):
            _, stack, _, pinned, *_ = state[name]
            for module, _ in reversed(stack):
                own = module._pins[name]
                if own["registered"] and getattr(module, "_v_signature", None) is not None:
                    yield own, pinned


class StreamingPatcher(StreamedStayPinned, ModelPatcherDynamic):
    """The host's patcher with dynamic VRAM; on a CPU, as in the host, a plain one."""


def has_dynamic_vram(disable_dynamic: bool) -> bool:
    """Whether models get a patcher with dynamic VRAM, unless that is disabled for one."""
    kind = comfy.model_patcher.CoreModelPatcher
    return not disable_dynamic and issubclass(kind, ModelPatcherDynamic)


def plain_patcher(
    model: Any,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a model whose patches the host merges; another pack's, if it set its own."""
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    kind = StreamingPatcher if kind is ModelPatcherDynamic else kind
    return kind(model, load_device=load_device, offload_device=offload_device)
