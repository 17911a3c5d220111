"""A VAE's pass over pictures within a number of bytes: planned, repeated smaller, never inexact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy import model_management
from torch import Tensor

from ..core.units import size_text
from ..core.vae_attention import BLOCK, FEWEST, AttentionSlices
from ..core.vae_plan import (
    Plan,
    Segment,
    comfortable_bytes,
    largest_side,
    plan_for,
    shape_before,
    whole_bytes,
)
from ..core.vae_tiles import Buffer, Load, Steps, Tiles, axis, scale_of
from . import recovery
from .vae_layers import BY_TILES, WHOLE, Layers, Outcome, times

WAIT_SECONDS, WAIT_STEP = 20.0, 1.0  # for memory that another program takes for a moment


class Pass:
    """Pictures through one direction of a VAE. `limit` in bytes; None is what is free.

    `size`: height and width of the sources, latents to decode or pixels to encode. `bar` makes the
    progress bar.
    """

    def __init__(
        self,
        vae: comfy.sd.VAE,
        layers: Layers,
        size: tuple[int, int],
        limit: int | None,
        bar: type[comfy.utils.ProgressBar] = comfy.utils.ProgressBar,
    ) -> None:
        self.vae, self.layers, self.size, self.limit, self.bar = vae, layers, size, limit, bar
        self.network = layers.network(vae)
        self.tile_limit: int | None = None  # bytes, since memory ran out
        self.attention_limit: int | None = None  # positions, likewise
        self.failures = self.tiles = self.slices = 0
        self.freed_others = self.in_ram = self.apart = False
        self.pictures, self.waited = 1, 0.0

    # ------------------------------------------------------------------------------------ memory
    def make_room(self, beside: int = 0) -> None:
        """Load the VAE, with room for one picture and `beside` bytes. Raises ValueError."""
        if self.limit is not None and self._least() > self.limit:
            width, height = self._pixels()
            raise ValueError(
                f"vram_limit is {size_text(self.limit)}, but {width}x{height} px take at "
                f"least {size_text(self._least())}. Raise it, or set it to 0 to use what is free."
            )
        asked = whole_bytes(self.network, *self.size)
        if self.free_bytes() < asked + beside + self.vae.model_size():
            asked = comfortable_bytes(self.network, *self.size)
        asked = (asked if self.limit is None else min(asked, self.limit)) + beside
        self._insist(lambda: self._load(asked), "while the VAE was loaded")
        if self.vae.patcher.is_dynamic():
            recovery.unpin(self.vae.patcher)  # what a node that failed may have left

    def _load(self, asked: int) -> None:
        """The VAE, with room beside it."""
        model_management.load_models_gpu(
            [self.vae.patcher], memory_required=asked, force_full_load=self.vae.disable_offload
        )

    def _free_others(self) -> None:
        """Unload every other model from the device."""
        self.freed_others = True
        recovery.unload_others(self.vae.device, [self.vae.patcher])
        model_management.soft_empty_cache()

    def free_bytes(self) -> int:
        """What is free or could be taken, less what ComfyUI leaves to other programs."""
        free = self.vae.patcher.get_free_memory(self.vae.device)
        return max(0, int(free) - int(model_management.extra_reserved_memory()))

    def room(self) -> int:
        """Bytes that the pass may take from now on."""
        free = self.free_bytes()
        return free if self.limit is None else min(self.limit, free)

    def _least(self) -> int:
        """Bytes of the smallest plan."""
        return plan_for(self.network, *self.size, 0).bytes

    def _pixels(self) -> tuple[int, int]:
        """Width and height of the picture."""
        up = scale_of(_joined(self.network.after))[0]
        return self.size[1] * up, self.size[0] * up

    def _choose_count(self, batch: int, estimate: int) -> int:
        """How many pictures go at once: as many as ComfyUI takes, which chooses the kernels, too.

        `estimate` is ComfyUI's, of one picture. One if the limit is too small for so many.
        """
        free = self.vae.patcher.get_free_memory(self.vae.device)
        count = max(1, min(batch, int(free / estimate)))
        network = self.layers.network(self.vae, count)
        if self.limit is not None and plan_for(network, *self.size, 0).bytes > self.limit:
            self.apart = count > 1
            return 1
        self.network = network
        return count

    # --------------------------------------------------------------------------------- the passes
    def run(
        self, source: Tensor, shape: Sequence[int], load: Load, estimate: int
    ) -> tuple[Tensor, Outcome]:
        """The result [b, c, 1, h, w] of this shape of a source [b, c, 1, h, w].

        `load` brings a part of the source to the device and dtype of the VAE; `estimate` is
        ComfyUI's of one picture, in bytes.
        """
        device, dtype = self.vae.output_device, self.vae.vae_output_dtype()
        held = math.prod(shape) * dtype.itemsize
        self.make_room(held if device == self.vae.device and device.type != "cpu" else 0)
        count = self._choose_count(len(source), estimate)
        made: list[Tensor] = []
        self._insist(
            lambda: made.append(torch.empty(shape, device=device, dtype=dtype)),
            "while the memory of the result was taken",
        )
        pairs = zip(source.split(count), made[0].split(count), strict=True)
        return made[0], self._run(list(pairs), load)

    def _run(self, pairs: list[tuple[Tensor, Tensor]], load: Load) -> Outcome:
        """Every source into its sink: whole if it fits, else by tiles."""
        room, need = self.room(), whole_bytes(self.network, *self.size)
        self.progress = self.bar(len(pairs))
        if need <= room:
            pairs = self._run_whole(pairs, load)
            if not pairs:
                return Outcome(WHOLE, need, failures=self.failures, apart=self.apart)
            room = min(need // 2, self.room())
        plan = plan_for(self.network, *self.size, room)
        self.in_ram = plan.in_ram
        planned = len(self._attention(plan, None).pending)
        planned += sum(s.rows * s.columns for s in (*plan.before, *plan.after))
        self._expect((planned - 1) * len(pairs))
        for source, sink in pairs:
            self._run_tiled(plan, Buffer.of(source), Buffer.of(sink), load)
        return self._outcome(plan)

    def _expect(self, more: int) -> None:
        """So many steps more than the progress bar knows of."""
        self.progress.update_absolute(self.progress.current, self.progress.total + more)

    def _run_whole(
        self, pairs: list[tuple[Tensor, Tensor]], load: Load
    ) -> list[tuple[Tensor, Tensor]]:
        """By all layers over whole pictures, one source after another; returns those not done."""
        for done, (source, sink) in enumerate(pairs):
            if not _succeeds(lambda s=source, t=sink: t.copy_(self.layers.whole(load(s)))):
                self._failed()
                return pairs[done:]
            self.progress.update(1)
        return []

    def _run_tiled(self, plan: Plan, source: Buffer, sink: Buffer, load: Load) -> None:
        """One source by a plan."""
        self.pictures = source.shape[0]
        x = self._between(self.network.after, 0, self._inner_size())
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
            target = sink if last else self._between(steps, segment.last, size)
            tiles = Tiles(
                layers[segment.first : segment.last],
                (segment.rows, segment.columns),
                (source, target),
                load,
                self.network.element_size,
                self.network.strips,
            )
            self._cut_as_before(tiles)
            self.tiles += self._finish(tiles)
            source.release()
            source, load = target, self._to_device

    def _cut_as_before(self, tiles: Tiles) -> None:
        """Smaller tiles where memory has run out; larger again as far as half of it is free."""
        if self.tile_limit is None:
            return
        pending = len(tiles.pending)
        taken = [b for b in tiles.buffers if b.movable and b.device == self.vae.device]
        bytes_of = [math.prod(b.shape) * b.dtype.itemsize for b in taken]
        free = self.free_bytes() - sum(
            n for b, n in zip(taken, bytes_of, strict=True) if b.tensor is None
        )
        if self.limit is not None:
            free = min(free, self.limit - sum(bytes_of))
        tiles.fit(max(self.tile_limit, free // 2))
        self._expect(len(tiles.pending) - pending)

    def _attention(self, plan: Plan, x: Buffer | None) -> AttentionSlices:
        """The middle, in the plan's slices, or smaller where memory has run out."""
        x = x or self._between(self.network.after, 0, self._inner_size())
        size = min(plan.attention, self.attention_limit or plan.attention)
        layers, fewest = self.layers, FEWEST if self.network.strips else BLOCK
        return AttentionSlices(
            layers.attention, x, size, layers.attend, self._to_device, layers.attended, fewest
        )

    def _between(self, part: tuple[Steps, ...], layer: int, size: tuple[int, int]) -> Buffer:
        """A picture of channels before a layer."""
        channels, height, width = shape_before(part, layer, *size)
        device = torch.device("cpu") if self.in_ram else self.vae.device
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
        self._failed()
        pending = len(work.pending)
        if isinstance(work, Tiles) and work.sink.lacking and work.sink.to_ram():
            self.in_ram = True  # no smaller tile would have helped
        elif work.shrink():
            if isinstance(work, Tiles):
                self.tile_limit = work.limit
            else:
                self.attention_limit = work.size
            self._expect(len(work.pending) - pending)
        elif any([buffer.to_ram() for buffer in work.buffers]):
            self.in_ram = True
        elif not self._more_room():
            raise RuntimeError(
                self._exhausted(
                    "in the smallest tiles, with all that lies between in RAM and no other model "
                    "loaded"
                )
            )

    def _insist(self, act: Callable[[], Any], doing: str) -> None:
        """What cannot be made smaller. Raises RuntimeError if it fails after all."""
        while not _succeeds(act):
            self._failed()
            if not self._more_room():
                raise RuntimeError(self._exhausted(f"{doing}, with no other model loaded"))

    def _more_room(self) -> bool:
        """By other models, then by waiting for other programs; False if all was tried."""
        if not self.freed_others:
            self._free_others()
            return True
        if self.waited >= WAIT_SECONDS or max(self.free_bytes(), self._at_most()) < self._least():
            return False
        recovery.wait(WAIT_STEP)
        self.waited += WAIT_STEP
        return True

    def _at_most(self) -> int:
        """What a pass could have if other programs gave all back; 0 where nothing tells."""
        device = self.vae.device
        if device.type != "cuda":
            return 0
        return int(model_management.get_total_memory(device)) - self.vae.model_size()

    def _failed(self) -> None:
        """Drop what a failed part left: half a cast of a streamed weight would change the rest."""
        self.failures += 1
        recovery.recover([self.vae.patcher], alone=True, thorough=False)

    def _exhausted(self, doing: str) -> str:
        """What was tried, what it needed, what is free, and what would fit."""
        width, height = self._pixels()
        up = scale_of(_joined(self.network.after))[0]
        free, least = self.free_bytes(), self._least()

        def fits(side: int) -> bool:
            return plan_for(self.network, side // up, side // up, free).bytes <= free

        side = largest_side(fits, 64, max(width, height))
        would = f"A picture of {side}x{side} px should fit. " if side**2 < width * height else ""
        if least <= free:
            would = (
                f"That should be enough, but failed for {self.waited:.0f} s: another program may "
                "take memory meanwhile. "
            )
        return (
            f"{width}x{height} px do not fit in the memory of {self.vae.device}: out of memory "
            f"{times(self.failures)}, at last {doing}. That needs about {size_text(least)}; "
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
            self.apart,
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
