"""A VAE's pass over pictures within a number of bytes: planned, repeated smaller, never inexact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.ldm.wan.vae as wan
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy import model_management
from torch import Tensor, nn

from ..core.units import size_text
from ..core.vae_attention import AttentionSlices, attend_by_products
from ..core.vae_plan import (
    Network,
    Plan,
    Segment,
    comfortable_bytes,
    largest_side,
    plan_for,
    shape_before,
    whole_bytes,
)
from ..core.vae_tiles import Buffer, Load, Steps, Tiles, axis, scale_of, steps_of
from . import recovery

WHOLE, BY_TILES = "whole", "tiles"


class Layers(NamedTuple):
    """One direction of Wan 2.1's VAE, its layers in their order, and what does all of it."""

    before: list[nn.Module]
    attention: nn.Module
    after: list[nn.Module]
    whole: Load

    @classmethod
    def decoding(cls, model: wan.WanVAE) -> Layers:
        """From latents to pixels."""
        decoder = model.decoder
        first, attention, last = decoder.middle
        after = [last, *decoder.upsamples, *decoder.head]
        return cls([model.conv2, decoder.conv1, first], attention, after, model.decode)

    @classmethod
    def encoding(cls, model: wan.WanVAE) -> Layers:
        """From pixels to the mean of the latents; the last layer adds channels of the variance."""
        encoder = model.encoder
        first, attention, last = encoder.middle
        before = [encoder.conv1, *encoder.downsamples, first]
        return cls(before, attention, [last, *encoder.head, model.conv1], model.encode)

    def network(self, vae: comfy.sd.VAE, pictures: int = 1) -> Network:
        """What a plan needs to know of `pictures` that go at once."""
        fused = (
            model_management.xformers_enabled_vae()
            or model_management.pytorch_attention_enabled_vae()
        )
        steps = (tuple(map(steps_of, part)) for part in (self.before, self.after))
        element_size = model_management.dtype_size(vae.vae_dtype) * pictures
        kind = vae.device.type
        return Network(*steps, element_size, fused, kind in ("cpu", "mps"), kind == "cpu")


class Outcome(NamedTuple):
    """What was done, for the node. `tile_px`: width and height of the largest planned tile."""

    how: str
    predicted_bytes: int
    tiles: int = 1
    tile_px: tuple[int, int] = (0, 0)
    slices: int = 1
    in_ram: bool = False
    failures: int = 0
    on_cpu: bool = True

    def text(self) -> str:
        """One line."""
        peak = size_text(self.predicted_bytes)
        if self.how == WHOLE:
            return f"whole picture at once, peak {peak} predicted; exact"
        width, height = self.tile_px
        line = f"{self.tiles} tiles of {width}x{height} px, peak {peak} predicted; "
        line += "exact" if self.on_cpu and self.slices == 1 else "exact up to rounding"
        if self.slices > 1:
            line += f"; attention in {self.slices} slices"
        if self.in_ram:
            line += "; pictures between them in RAM"
        if self.failures:
            line += f"; out of memory {self.failures} times, went on smaller"
        return line


class Pass:
    """Pictures through one direction of a VAE. `limit` in bytes; None is what is free.

    `size`: height and width of the sources, latents to decode or pixels to encode; `pictures`: how
    many of them a source holds.
    """

    def __init__(
        self,
        vae: comfy.sd.VAE,
        layers: Layers,
        size: tuple[int, int],
        limit: int | None,
        pictures: int = 1,
    ) -> None:
        self.vae, self.layers, self.size, self.limit = vae, layers, size, limit
        self.network = layers.network(vae, pictures)
        self.tile_limit: int | None = None  # since memory ran out
        self.failures = self.tiles = self.slices = 0
        self.freed_others = self.in_ram = False
        self.pictures = pictures

    # ------------------------------------------------------------------------------------ memory
    def make_room(self) -> int:
        """Load the VAE and return the bytes that its pass may take. Raises ValueError."""
        asked = comfortable_bytes(self.network, *self.size)
        if self.limit is not None:
            least = plan_for(self.network, *self.size, 0).bytes
            if least > self.limit:
                width, height = self._pixels()
                raise ValueError(
                    f"vram_limit is {size_text(self.limit)}, but {width}x{height} px take at "
                    f"least {size_text(least)}. Raise it, or set it to 0 to use what is free."
                )
            asked = min(asked, self.limit)
        if not _succeeds(lambda: self._load(asked)):
            self._free_others()
            self._load(asked)
        if self.vae.patcher.is_dynamic():
            recovery.unpin(self.vae.patcher)  # what a node that failed may have left
        free = self.free_bytes()
        return free if self.limit is None else min(self.limit, free)

    def _load(self, asked: int) -> None:
        """The VAE, with room beside it."""
        model_management.load_models_gpu(
            [self.vae.patcher], memory_required=asked, force_full_load=self.vae.disable_offload
        )

    def _free_others(self) -> None:
        """Unload every other model from the device."""
        self.freed_others = True
        loaded = model_management.current_loaded_models
        own = [entry for entry in loaded if entry.model is self.vae.patcher]
        model_management.free_memory(1e30, self.vae.device, keep_loaded=own)
        model_management.soft_empty_cache()

    def free_bytes(self) -> int:
        """What is free or could be taken, less what ComfyUI leaves to other programs."""
        free = self.vae.patcher.get_free_memory(self.vae.device)
        return max(0, int(free) - int(model_management.extra_reserved_memory()))

    def _pixels(self) -> tuple[int, int]:
        """Width and height of the picture."""
        up = scale_of(_joined(self.network.after))[0]
        return self.size[1] * up, self.size[0] * up

    # --------------------------------------------------------------------------------- the passes
    def run(self, sources: Sequence[Tensor], sinks: Sequence[Tensor], load: Load) -> Outcome:
        """Every source [b, c, 1, h, w] into its sink: whole if it fits, else by tiles.

        `load` brings a part of a source to the device and dtype of the VAE.
        """
        room = self.make_room()
        need = whole_bytes(self.network, *self.size)
        pairs = list(zip(sources, sinks, strict=True))
        if need <= room:
            pairs = self._run_whole(pairs, load)
            if not pairs:
                return Outcome(WHOLE, need)
            room = need // 2
        plan = plan_for(self.network, *self.size, room)
        self.in_ram = plan.in_ram
        planned = len(self._attention(plan, None).pending)
        planned += sum(s.rows * s.columns for s in (*plan.before, *plan.after))
        self.progress = comfy.utils.ProgressBar(planned * len(pairs))
        for source, sink in pairs:
            self._run_tiled(plan, Buffer.of(source), Buffer.of(sink), load)
        return self._outcome(plan)

    def _run_whole(
        self, pairs: list[tuple[Tensor, Tensor]], load: Load
    ) -> list[tuple[Tensor, Tensor]]:
        """By the model's own call, one source after another; returns those not done."""
        self.progress = comfy.utils.ProgressBar(len(pairs))
        for done, (source, sink) in enumerate(pairs):
            if not _succeeds(lambda s=source, t=sink: t.copy_(self.layers.whole(load(s)))):
                self.failures += 1
                self._recover()
                return pairs[done:]
            self.progress.update(1)
        return []

    def _run_tiled(self, plan: Plan, source: Buffer, sink: Buffer, load: Load) -> None:
        """One source by a plan."""
        self.pictures = source.shape[0]
        x = self._between(plan, self.network.after, 0, self._inner_size())
        self._run_part(plan, True, (source, x), load)
        self.slices = max(self.slices, self._finish(self._attention(plan, x)))
        self._run_part(plan, False, (x, sink), self._to_device)

    def _run_part(self, plan: Plan, before: bool, ends: tuple[Buffer, Buffer], load: Load) -> None:
        """The layers on one side of the attention."""
        layers = self.layers.before if before else self.layers.after
        steps = self.network.before if before else self.network.after
        size = self.size if before else self._inner_size()
        source, sink = ends
        for segment in plan.before if before else plan.after:
            last = segment.last == len(layers)
            target = sink if last else self._between(plan, steps, segment.last, size)
            tiles = Tiles(
                layers[segment.first : segment.last],
                (segment.rows, segment.columns),
                (source, target),
                load,
                self.network.element_size,
                self.network.strips,
            )
            if self.tile_limit is not None:
                tiles.fit(self.tile_limit)
            self.tiles += self._finish(tiles)
            source.release()
            source, load = target, self._to_device

    def _attention(self, plan: Plan, x: Buffer | None) -> AttentionSlices:
        """The middle, in the plan's slices."""
        x = x or self._between(plan, self.network.after, 0, self._inner_size())
        attend = comfy.ops.scaled_dot_product_attention
        if not self.network.fused:
            attend = attend_by_products
        return AttentionSlices(self.layers.attention, x, plan.attention, attend, self._to_device)

    def _between(
        self, plan: Plan, part: tuple[Steps, ...], layer: int, size: tuple[int, int]
    ) -> Buffer:
        """A picture of channels before a layer."""
        channels, height, width = shape_before(part, layer, *size)
        device = torch.device("cpu") if plan.in_ram else self.vae.device
        return Buffer((self.pictures, channels, 1, height, width), device, self.vae.vae_dtype)

    def _inner_size(self) -> tuple[int, int]:
        """Height and width at the attention."""
        return shape_before(self.network.before, len(self.network.before), *self.size)[1:]

    def _to_device(self, part: Tensor) -> Tensor:
        return part.to(self.vae.device)

    # ------------------------------------------------------------------------- when memory runs out
    def _finish(self, work: Tiles | AttentionSlices) -> int:
        """All that is pending, smaller where it fails; returns how many steps it took.

        ComfyUI's convolutions look for an interrupt, each one.
        """
        steps = 0
        while work.pending:
            if _succeeds(work.step):
                self.progress.update(1)
                steps += 1
            else:
                self._give_way(work)
        return steps

    def _give_way(self, work: Tiles | AttentionSlices) -> None:
        """Make what is left smaller, or room for it. Raises RuntimeError if nothing is left."""
        self.failures += 1
        self._recover()
        pending = len(work.pending)
        if work.shrink():
            if isinstance(work, Tiles):
                self.tile_limit = work.limit
            more = len(work.pending) - pending
            self.progress.update_absolute(self.progress.current, self.progress.total + more)
        elif any([buffer.to_ram() for buffer in work.buffers]):
            self.in_ram = True
        elif not self.freed_others:
            self._free_others()
        else:
            raise RuntimeError(self._exhausted(work))

    def _recover(self) -> None:
        """Drop what a failed part left: half a cast of a streamed weight would change the rest."""
        recovery.recover([self.vae.patcher], alone=True, thorough=False)

    def _exhausted(self, work: Tiles | AttentionSlices) -> str:
        """What was tried, what it needed, what is free, and what would fit."""
        width, height = self._pixels()
        up = scale_of(_joined(self.network.after))[0]
        free = self.free_bytes()

        def fits(side: int) -> bool:
            return plan_for(self.network, side // up, side // up, free).bytes <= free

        side = largest_side(fits, 64, max(width, height))
        would = f"A picture of {side}x{side} px should fit. " if side**2 < width * height else ""
        least = plan_for(self.network, *self.size, 0).bytes
        return (
            f"{width}x{height} px do not fit in the memory of {self.vae.device}: out of memory "
            f"{self.failures} times, at last in the smallest tiles, with all that lies between "
            f"in RAM and no other model loaded. That needs about {size_text(least)}; "
            f"{size_text(free)} are free. {would}Close other programs that use the device, or "
            "start ComfyUI with --cpu-vae."
        )

    def _outcome(self, plan: Plan) -> Outcome:
        """After the last picture."""
        decoding = scale_of(_joined(self.network.after))[0] > 1
        segment = plan.after[-1] if decoding else plan.before[0]
        return Outcome(
            BY_TILES,
            plan.bytes,
            self.tiles,
            self._tile_px(segment, decoding),
            self.slices,
            self.in_ram,
            self.failures,
            self.vae.device.type == "cpu",
        )

    def _tile_px(self, segment: Segment, decoding: bool) -> tuple[int, int]:
        """Width and height in pixels of the largest tile of the segment that touches the pixels."""
        part = self.network.after if decoding else self.network.before
        size = self._inner_size() if decoding else self.size
        steps = _joined(part[segment.first : segment.last])
        sizes = shape_before(part, segment.first, *size)[1:]
        scale = 1 if decoding else scale_of(steps)[1]
        longest = [
            max(p.stop - p.start for p in axis(steps, length, count).pieces) * scale
            for length, count in zip(sizes, (segment.rows, segment.columns), strict=True)
        ]
        return longest[1], longest[0]


def _joined(part: tuple[Steps, ...]) -> Steps:
    return tuple(step for steps in part for step in steps)


def _succeeds(act: Callable[[], Any]) -> bool:
    """False when memory ran out. Outside of `except`: the error keeps the stack's tensors alive."""
    try:
        act()
        return True
    except Exception as error:
        if not recovery.is_oom(error):
            raise
    return False
