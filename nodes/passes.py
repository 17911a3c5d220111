"""The forward passes of one run: each is repeated, with a smaller plan, until it fits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor

from ..core import budget
from ..core.budget import POLICIES, Memory, Plan
from ..core.budget_text import failure_text, share_of_sides
from ..core.units import size_text
from . import foreign, outcome, recovery, reductions, slicing
from .outcome import Record
from .place import MEASURED, Place
from .slicing import Plans
from .transformer_options import HOLDINGS, ON_SUCCESS
from .unmerged_patcher import lora_bytes
from .vram_limit import VRAMLimit
from .workload import memory_of, work_of

log = logging.getLogger("qwen_vram")

TILES = Plan(tiles=2)
REPEATS = 2  # on a rung to which nothing follows
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 20.0
GIVEN_BACK_SECONDS = 6.0
Conds = dict[str, list[dict[str, Any]]]
SPARE_BYTES = 512_000_000  # to make room with for what is not predicted
NEVER_RAN = (
    "There is not enough memory even to load the model. Close what else uses the device, or load "
    "the model in a smaller format."
)
BESIDE = (
    "Memory ran out outside of the model's forward passes, in {} runs one after the other: in the "
    "sampler's own arithmetic, in a ControlNet, or in another node's patch. Free now: {}. Make the "
    "picture or the batch smaller, or close what else uses the device."
)
LIMITED = "vram_limit holds this run within {}: a higher limit, or 0, leaves more."
REPEATING = "out of memory: memory given back, repeating a forward pass, {}"
WAITING = "out of memory: another program took some, waiting for it"


class DoesNotFit(RuntimeError):
    """Even the last rung failed.

    Not what ComfyUI takes for out of memory, which would make it
    unload all models and give its own advice.

    There were `free` bytes. Of the sides of the picture the share `scale` should fit: 0 if no size
    would, 1 if this size should have.
    """

    def __init__(self, text: str, free: int, scale: float) -> None:
        super().__init__(text)
        self.free, self.scale = free, scale


class Passes:
    """What one run does on each of its devices. Several GPUs' threads come here at a time."""

    def __init__(
        self,
        policy: str,
        plans: Plans,
        sliced: bool,
        record: Record,
        limit: VRAMLimit,
        nodes: tuple[str | None, ...],
    ) -> None:
        self.policy, self.plans, self.sliced = policy, plans, sliced
        self.record, self.limit = record, limit
        self.used: list[ModelPatcher] = []  # models that this run needs
        self._expected = 0  # bytes that a pass needs
        self._places: dict[torch.device, Place] = {}
        self._peaks: dict[str, tuple[int, int]] = {}  # key -> (predicted, measured)
        self._seen: set[tuple[Any, ...]] = set()
        self._pending: list[Callable[[], None]] | None = None
        self._lock = threading.Lock()
        # ComfyUI walks its list of loaded models by index and takes models out: one at a time.
        self._host = threading.Lock()
        self._nodes = nodes

    # ------------------------------------------------------------------------- one forward pass
    def forward(
        self,
        executor: WrapperExecutor,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None,
        c_crossattn: torch.Tensor | None,
        control: Any,
        options: dict[str, Any],
        **more: Any,
    ) -> torch.Tensor:
        """Run it on the first rung that should fit, and further down until it does."""
        place = self._place(executor.class_obj, options)
        together = reductions.together(executor.class_obj, x, options)
        whole = reductions.possible(TILES, x, control, options)[1]
        work = work_of(executor.class_obj, place.sliced, x, c_crossattn, more, together)
        work = replace(work, tileable=not whole)
        with self._host:
            place.begin(work, self.policy, self._memory(place))
            self._make_room(place, failed=False)
        while True:
            done = options[ON_SUCCESS] = []
            plan = place.rung.plan
            self.plans.set(place.patcher.load_device, plan)
            self.record.use(place.index, place.rung, place.need())
            if place.rung is place.rungs[-1] and self.policy != POLICIES[0]:
                self.record.note(whole)  # else there would be more to try
            arguments = (executor, plan, x, t, c_concat, c_crossattn, control, options)
            peak = _Peak(place.patcher, self._is_new(place))
            restore = foreign.kept(options, x)
            output = recovery.attempt(lambda a=arguments: reductions.forward(*a, **more))
            options.pop(ON_SUCCESS)
            if output is not None:
                self._note_peak(place, peak)
                self._commit(done)
                return output
            restore()
            self.suspect(options, foreign.AROUND_A_PASS)
            del arguments, done, restore
            self._step_down(place, alone="multigpu_thread_device" not in options)

    def _place(self, model: BaseModel, options: dict[str, Any]) -> Place:
        patcher = model.current_patcher
        with self._lock:
            place = self._places.get(patcher.load_device)
            if place is None:
                replaced = slicing.replaced(model) if self.sliced else ""
                self.record.note(replaced)
                place = Place(patcher, model, self.sliced and not replaced)
                self._places[patcher.load_device] = place
        place.holdings = options.get(HOLDINGS) or ()
        return place

    def _memory(self, place: Place) -> Memory:
        limited = place.patcher.load_device == self.limit.device
        cap = self.limit.room([*self.used, place.patcher]) if limited else None
        return memory_of(place.patcher, self.used, place.holdings, cap)

    def _step_down(self, place: Place, alone: bool) -> None:
        """After a pass that failed: make room, and choose the rung to repeat it on.

        Raises DoesNotFit, or ComfyUI's InterruptProcessingException.
        """
        self.record.repeat()
        with self._host:
            recovery.recover([place.patcher], alone, thorough=place.failures > 0)
            memory = self._memory(place)
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not place.fail(memory):
            self._descend(place, memory)
        with self._host:
            self._make_room(place, failed=True)
        self.say(REPEATING.format(place.rung.text))
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _descend(self, place: Place, memory: Memory) -> None:
        """To the next rung that promises more; at the end of those that are exact only after
        other tries, and after waiting for a program that took memory. Raises DoesNotFit."""
        index = place.following(memory, place.stop)
        if index is None:
            if place.repeats < REPEATS or self._wait(place, memory):
                place.repeats += 1
                return
            index = place.following(memory, len(place.rungs))
        if index is None:
            raise self.failure(place)
        place.descend(index, memory)

    def _wait(self, place: Place, memory: Memory) -> bool:
        """Wait for memory that another program took; False where none did, or it keeps it.

        Not long where it has given it back already: then the pass may fail for another reason.
        """
        longest = LONGEST_WAIT_SECONDS if place.robbed(memory) else 0.0
        if place.gave_back(memory):
            longest = max(longest, GIVEN_BACK_SECONDS)
        pause = min(FIRST_WAIT_SECONDS + place.waited, longest - place.waited)
        if pause <= 0:
            return False
        self.say(WAITING)
        recovery.wait(pause)
        place.waited += pause
        self.record.wait(pause)
        return True

    def _make_room(self, place: Place, failed: bool) -> None:
        """What the rung allows, as far as the pass lacks memory, or has failed. Under `_host`."""
        memory, rung, need = self._memory(place), place.rung, place.need()
        doubted = rung.plan in place.doubted
        place.doubted.discard(rung.plan)  # once
        spare = need // 4 if failed or doubted else 0
        lacking = need + spare - memory.free
        if doubted:
            lacking = max(lacking, spare)
        if lacking <= 0 and not failed:
            return
        if rung.free_others and memory.others:
            recovery.unload_others(place.patcher.load_device, [*self.used, place.patcher])
            lacking -= memory.others
        self._stream(place, lacking if rung.headroom else 0, need + spare)
        if rung.release:
            for holding in place.holdings:
                holding.release()

    def _limited(self, place: Place) -> bool:
        return self.limit.enforced and place.patcher.load_device == self.limit.device

    def _stream(self, place: Place, lacking: int, need: int) -> None:
        """Let more of the weights be streamed; within a limit, as it divides the memory."""
        if self._limited(place):
            self.limit.fit_weights(place.patcher, need, self.used)
        else:
            recovery.stream_more(place.patcher, lacking)

    # --------------------------------------------------------------- outside of a forward pass
    def suspect(self, options: dict[str, Any], kinds: Sequence[str], *more: dict[str, Any]) -> None:
        """Something is repeated: what other nodes put around it may remember the first time.

        `options` are the transformer's; `more` the model's, where its function is repeated too.
        """
        names = foreign.strangers(options, kinds)
        names += [foreign.FUNCTION] if any(foreign.FUNCTION in each for each in more) else []
        if names:
            self.record.doubt(foreign.SAW_A_FAILURE.format(", ".join(names)))

    def make_room(self) -> None:
        """After something else than a forward pass failed: whatever costs the picture nothing.

        No other thread computes then.
        """
        recovery.recover(self.used, alone=True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        devices = {patcher.load_device for patcher in self.used}
        for device in devices or {self.limit.device}:  # nothing is in use: the load itself failed
            recovery.unload_others(device, self.used)
        needs = [place.need() for place in self._places.values()] or [self._expected]
        if self.limit.enforced and self.used:  # recovering lifted the watermark
            self.limit.fit_weights(self.used[0], max(needs) + SPARE_BYTES, self.used)
        for place in self._places.values():
            if not self._limited(place):
                recovery.stream_more(place.patcher, SPARE_BYTES)
            for holding in place.holdings:
                holding.release()

    def expect(self, model: ModelPatcher, shape: Sequence[int], conds: Conds) -> int:
        """Bytes that forward passes will need within the limit; 0 without. Before the load.

        `shape` is the noise's. What else lies on the card counts too: it goes if it must.
        """
        if not self.limit.enforced:
            return 0
        every = [cond for conditionings in conds.values() for cond in conditionings]
        references = max((c.get("reference_latents") or () for c in every), key=_size, default=())
        texts = [c["cross_attn"] for c in every if c.get("cross_attn") is not None]
        x = torch.empty(tuple(shape), device="meta")
        text = max(texts, key=lambda tensor: tensor.shape[1], default=None)
        work = work_of(model.model, self.sliced, x, text, {"ref_latents": list(references)})
        place = Place(model, model.model, self.sliced)
        memory = memory_of(model, [model], (), self.limit.room([model]))
        if model.model_size() + place.need_of(work, self.policy, memory) > memory.free:
            recovery.unload_others(model.load_device, [model])
            memory = memory_of(model, [model], (), self.limit.room([model]))
        self._expected = place.need_of(work, self.policy, memory)
        return self._expected

    def hold(self) -> None:
        """From now on, what passes commit waits for the end of the calculation around them."""
        self._pending = []

    def commit(self) -> None:
        """That calculation has succeeded."""
        pending, self._pending = self._pending, None
        for act in pending or ():
            act()

    def _commit(self, done: list[Callable[[], None]]) -> None:
        with self._lock:
            if self._pending is not None:
                self._pending += done
                return
        for act in done:
            act()

    def say(self, text: str) -> None:
        """In the log, and on the node while it runs."""
        log.info("%s", text)
        outcome.tell(text, *self._nodes)

    def failure(self, place: Place) -> DoesNotFit:
        """The final error: what was tried, what it needed, and what would fit."""
        memory = self._memory(place)
        largest = budget.largest_side(place.work, self.policy, memory, place.factor)
        attempts = list(place.attempts.values())
        text = failure_text(place.work, attempts, memory, largest, self.policy)
        scale = min(1.0, share_of_sides(place.work, largest))
        return DoesNotFit(self._with_limit(text), memory.free, scale)

    def failure_beside(self, runs: int) -> DoesNotFit:
        """The final error where it was never a forward pass that failed in the end."""
        if not self.used:
            return DoesNotFit(self._with_limit(NEVER_RAN), 0, 0.0)
        patcher = self.used[0]
        cap = self.limit.room(self.used) if patcher.load_device == self.limit.device else None
        free = max(0, memory_of(patcher, self.used, (), cap).free)
        return DoesNotFit(self._with_limit(BESIDE.format(runs, size_text(free))), free, 1.0)

    def _with_limit(self, text: str) -> str:
        if not self.limit.limit:
            return text
        return text + "\n" + LIMITED.format(size_text(self.limit.limit))

    # -------------------------------------------------------------------------------- learning
    def _is_new(self, place: Place) -> bool:
        """Whether nobody has measured such a pass in this run."""
        name = (place.patcher.load_device, place.work, place.rung.plan)
        with self._lock:
            new = name not in self._seen
            self._seen.add(name)
        return new

    def _note_peak(self, place: Place, peak: _Peak) -> None:
        if (measured := peak.bytes()) is None:
            return
        predicted, key = budget.need(place.work, place.rung.plan), place.key(place.rung.plan)
        self.record.took(place.rung, measured)
        with self._lock:
            if measured > self._peaks.get(key, (0, 0))[1]:
                self._peaks[key] = predicted, measured

    def learn(self) -> None:
        """Correct the predictions by what this run really took."""
        for key, (predicted, measured) in self._peaks.items():
            MEASURED.learn(key, predicted, measured)

    def end(self) -> None:
        """Leave nothing to the next run."""
        for reason in self.plans.reasons():
            self.record.note(reason)
        self.plans.reset()
        self._places.clear()
        self.used = []


def _size(latents: Sequence[torch.Tensor]) -> int:
    return sum(latent.numel() for latent in latents)


class _Peak:
    """The peak of torch's allocations in one pass: its count costs nothing on the GPU.

    Less the factors of LoRAs that it brought in: the next pass finds them there.
    """

    def __init__(self, patcher: ModelPatcher, wanted: bool) -> None:
        device = patcher.load_device
        self.device = device if wanted and device.type == "cuda" else None
        self.patcher = patcher
        if self.device is not None:
            self.loras = lora_bytes(patcher)[0]
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def bytes(self) -> int | None:
        """None where it was not measured."""
        if self.device is None:
            return None
        brought = max(0, lora_bytes(self.patcher)[0] - self.loras)
        return torch.cuda.max_memory_allocated(self.device) - self.before - brought
