"""Less VRAM than the card has, for one run: weights and activations together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from .devices import device_memory
from .loaded_models import loaded
from .recovery import is_used, stream_more, vbar_of
from .status import size_text
from .unmerged_patcher import bytes_to_come

GB = 1_000_000_000
LIMIT = "qwen_vram.vram_limit"  # in transformer_options: the bytes of the patch, 0 without a limit
RANGE: dict[str, Any] = {"min": 0.0, "max": 1024.0, "step": 0.1, "round": 0.01}  # of the input
NOT_HERE = "the VRAM limit only decides how to run: PyTorch cannot limit {}"
MEMORIES = {  # by the kind of device
    "cpu": "how much RAM it takes",
    "mps": "how much of Apple's shared memory it takes",
    "privateuseone": "memory under DirectML",
    "xpu": "the memory of Intel cards",
}
TOO_LARGE = "the VRAM limit of {} is more than the {} there are: it changes nothing"
TOO_SMALL = (
    "vram_limit is {}, but ComfyUI takes {} on {} before any model is loaded. "
    "Set vram_limit higher, or to 0 for all there is."
)


class VRAMLimit:
    """Holds a run on one device within a number of bytes; 0 means all there is.

    torch's part is held by the fraction that it may reserve, the pages of dynamic VRAM by a
    watermark. Both are only for this run: use it as a context manager. What the driver itself
    takes of the card for this process counts too, where it can be measured.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit, self.note = device, limit, ""
        self.enforced = limit > 0 and device.type == "cuda"
        self.total = self.overhead = 0
        self._before: float | None = None
        if limit > 0 and not self.enforced:
            memory = MEMORIES.get(device.type, f"the memory of {device.type} devices")
            self.note = NOT_HERE.format(memory)
        if self.enforced:
            self._look()

    def _look(self) -> None:
        """Raises ValueError where nothing could run within the limit."""
        self.total = torch.cuda.mem_get_info(self.device)[1]
        if self.limit >= self.total:
            self.note = TOO_LARGE.format(size_text(self.limit), size_text(self.total))
            self.enforced, self.limit = False, 0
            return
        own = device_memory(self.device).own_bytes
        self.overhead = 0 if own is None else max(0, own - self._reserved() - self._pages())
        if self.overhead >= self.limit:
            sizes = size_text(self.limit), size_text(self.overhead)
            raise ValueError(TOO_SMALL.format(*sizes, self.device))

    def __enter__(self) -> VRAMLimit:
        if self.enforced:
            self._before = _fraction(self.device)
            self._allow(self.limit - self.overhead)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            torch.cuda.set_per_process_memory_fraction(self._before, self.device)
            self._before = None

    def room(self, used: Sequence[ModelPatcher] = ()) -> int | None:
        """Bytes that the activations may still have while all of torch's tensors stay; None
        without a limit. Pages of dynamic VRAM give way, and count as free: those of the models
        `used`, since other models' only do once the whole card is full."""
        if not self.limit:
            return None
        if not self.enforced:
            return self.limit
        allocated = torch.cuda.memory_allocated(self.device)
        return max(0, self.limit - self.overhead - allocated - self._pages(used))

    def fit_weights(
        self, patcher: ModelPatcher, need: int, used: Sequence[ModelPatcher] = ()
    ) -> None:
        """Once a model is loaded: keep so much of its weights streamed that `need` bytes fit, and
        what its LoRAs bring in.

        With dynamic VRAM the models `used` beside it, as ControlNets, share what is left.
        """
        if not self.enforced:
            return
        need += bytes_to_come(patcher)
        used = [patcher, *used]
        kept = self._pages(used)
        allowed = max(0, self.limit - self.overhead - kept - need)
        if vbar_of(patcher) is None:
            others = torch.cuda.memory_allocated(self.device) - patcher.loaded_size()
            stream_more(patcher, patcher.loaded_size() + max(0, others) - allowed)
            return
        pages = max(0, allowed - torch.cuda.memory_allocated(self.device) - _casts(patcher))
        shares = [(vbar, p.model_size()) for p in used if (vbar := self._vbar(p)) is not None]
        sizes = {id(vbar): (vbar, max(1, size)) for vbar, size in shares}
        total = sum(size for _, size in sizes.values())
        for vbar, size in sizes.values():  # a load, which comes before every run, lifts it again
            vbar.set_watermark(pages * size // total)
        self._allow(self.limit - self.overhead - kept - pages)

    def load_shape(self, patcher: ModelPatcher, shape: list[int], need: int) -> list[float]:
        """The shape of the noise to plan a load with, so that ComfyUI leaves more weights in RAM.

        Without dynamic VRAM it fills the card, all but what it thinks the noise needs: that
        grows with the first number.
        """
        if not self.enforced or patcher.is_dynamic():
            return shape
        free = comfy.model_management.get_free_memory(self.device) + patcher.loaded_size()
        weights = max(0, self.limit - self.overhead - need)
        wanted = free - weights - comfy.model_management.extra_reserved_memory()
        usual = patcher.model.memory_required(shape)
        return [shape[0] * max(1.0, wanted / max(1.0, usual)), *shape[1:]]

    def _allow(self, torch_bytes: int) -> None:
        """What torch may reserve from now on."""
        fraction = math.floor(max(0, torch_bytes) / self.total * 1e6) / 1e6
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), self.device)

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def _vbar(self, patcher: ModelPatcher) -> Any:
        return vbar_of(patcher) if patcher.load_device == self.device else None

    def _pages(self, but: Sequence[ModelPatcher] = ()) -> int:
        """Bytes in pages of dynamic VRAM, of all models on this device but these."""
        vbars = [self._vbar(patcher) for _, patcher in loaded() if not is_used(patcher, but)]
        return sum(vbar.loaded_size() for vbar in vbars if vbar is not None)


def _casts(patcher: ModelPatcher) -> int:
    """Bytes of torch's in which dynamic VRAM casts weights for their use: two of the largest, in
    16 bits. Where a picture is small they are more than its activations."""
    largest = max((weight.numel() for weight in patcher.model.parameters()), default=0)
    return 2 * largest * torch.float16.itemsize


def _fraction(device: torch.device) -> float:
    """What torch may reserve now. Older versions cannot tell; then nobody has limited it.

    cudaMallocAsync tells more than 1 where there is no limit.
    """
    ask: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if ask is None else min(1.0, ask(device))
