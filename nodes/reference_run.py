"""The forward passes of one run of a sampler under a reference cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ..core.refresh_policy import Pass, Policy, step_of
from . import cache_obstacles, foreign, token_reuse
from .attention_override import foreign_in
from .cache_record import CacheRecord
from .reference_memory import new_store
from .reference_slots import Key, Slot, Slots
from .region_reuse import Outside, Region
from .token_reuse import Group, Seen, references_of
from .transformer_options import ON_SUCCESS, Options, part_of

METHOD, ZERO = "ref_latents_method", "index_timestep_zero"  # the host's words
BY_INDEX = ("index", ZERO)
REFERENCES = "references"
LOOKAHEAD = 2  # steps: as far as a sampler (heunpp2) calls the model ahead of its own step
NOT_CAUSAL = "causal is off there, too"
PLACED = "causal takes the reference method {} for index_timestep_zero"
NO_ATTENTION = "another node's attention passes ComfyUI's by, so that nothing can be recorded"
TWICE = (
    "another node computes the same conditions in two ways in one step (other attention, other "
    "text): only the first of them reuses"
)
CHANGED = (
    "text, mask, references or another node's attention changed within the run: what was recorded "
    "with the old ones was of no use any more"
)
BACK = "the sampler went back in its schedule: everything was recorded anew"
BROKEN = (
    "Reference Cache: another node took the reference cache's attention away in the middle of a "
    "run. Take that node out, or the reference cache."
)


@dataclass
class Run:
    """From the loading of the model to the last step. Several GPUs' threads may call `forward`.

    It is a holding (transformer_options.HOLDINGS): what it keeps on the GPU can be released
    between two forward passes, and is recorded again in the next one.
    """

    policy: Policy
    shape: tuple[int, ...]  # of the whole picture's latent
    store_format: str
    causal: bool
    record: CacheRecord
    guider: Any = None
    pictures: int = 1  # in the batch
    place: str = "gpu"
    region: Region | None = None  # for what lies outside the sampler's mask
    off: str = ""  # why nothing is reused in this run
    full: str = ""  # why nothing is kept in this run; causal attention stays
    slots: Slots = field(default_factory=Slots)

    def bytes_held(self) -> int:
        """On the GPU."""
        return self.slots.bytes_held().get("gpu", 0)

    def release(self) -> None:
        """Give back what no forward pass uses at the moment. What lies in RAM stays."""
        if self.bytes_held():
            self.slots.clear()

    def end(self) -> None:
        """Leave nothing."""
        self.slots.clear()
        self.guider = None

    # ------------------------------------------------------------------------ one forward pass
    def forward(
        self,
        executor: WrapperExecutor,
        arguments: Sequence[Any],
        options: Options,
        more: dict[str, Any],
    ) -> Tensor:
        """See token_reuse.forward."""
        if not arguments[4] and self.region is None:  # this side of CFG has no references
            return executor(*arguments, options, **more)
        x, control = arguments[0], more.get("control")
        reason = self.off or cache_obstacles.of_pass(
            executor, x, options, control, self.shape[-2:], self._function()
        )
        if reason:
            self._aside(reason, self.causal)
            return self._uncounted(options, executor(*arguments, options, **more))
        method = more.get(METHOD, executor.class_obj.default_ref_method)
        if self.causal and arguments[4]:  # as such models are trained
            self.record.note(PLACED.format(method) if method not in BY_INDEX else "")
            more = {**more, METHOD: (method := ZERO)}
        if self.full or self.policy.always_full:
            return self._in_full(executor, arguments, options, more)
        key, content = self._identity(arguments, options, method)
        slot = self.slots.find(key, content, lambda: self._slot(arguments), _sigma(options))
        self.record.note(CHANGED if self.slots.changed else "")
        if slot is None:
            self._aside(TWICE)
            return self._in_full(executor, arguments, options, more, counted=False)
        if slot.references is None and slot.outside is None:
            return executor(*arguments, options, **more)
        slot.busy = True
        try:
            return self._pass(executor, arguments, options, more, slot)
        finally:
            slot.busy = False

    def _in_full(
        self,
        executor: WrapperExecutor,
        arguments: Sequence[Any],
        options: Options,
        more: dict[str, Any],
        counted: bool = True,
    ) -> Tensor:
        """Nothing is kept: ComfyUI's own pass, but for causal attention."""
        if self.causal:
            seen = Seen()
            output = token_reuse.forward(executor, arguments, options, (), more, True, seen)
            if seen.attention < seen.blocks:
                self._give_up(())
                counted = False
        else:
            output = executor(*arguments, options, **more)
        if not counted:
            return self._uncounted(options, output)
        step = self._step(options)
        _on_success(options, lambda: self.record.passed(step, full=True))
        return output

    def _uncounted(self, options: Options, output: Tensor) -> Tensor:
        """Of a pass that is told of by its reason."""
        step = self._step(options)
        _on_success(options, lambda: self.record.came(step))
        return output

    def _pass(
        self,
        executor: WrapperExecutor,
        arguments: Sequence[Any],
        options: Options,
        more: dict[str, Any],
        slot: Slot,
    ) -> Tensor:
        """Record, or reuse what was recorded."""
        if slot.dirty:
            slot.forget()
        step = self._step(options, slot.step)
        if _went_back(step, slot.step):
            slot.forget()
            self.record.note(BACK)
        groups = self._plan(slot, step, self.policy.decide(step, slot.recorded_at, self.causal))
        # A pass that only reuses writes nothing: one that fails is repeated with the same.
        slot.dirty = any(not group.reuse or group.threshold is not None for group in groups)
        seen = Seen()
        try:
            output = token_reuse.forward(
                executor, arguments, options, groups, more, self.causal, seen
            )
        finally:
            for group in groups:  # also where memory ran out: what lies in RAM is to stay
                group.store.unstage()
        if not seen.blocks:  # EasyCache skipped the model
            slot.dirty = False
            return output
        if seen.attention < len(executor.class_obj.transformer_blocks):
            self._give_up(groups)
            slot.release()
            return self._uncounted(options, output)
        _on_success(options, self._commit(slot, groups, step, _sigma(options)))
        return output

    def _plan(self, slot: Slot, step: int, decision: Pass) -> list[Group]:
        """What becomes of a slot's groups in the next pass."""
        groups: list[Group] = []
        if (references := slot.references) is not None:
            references.reuse = references.known and decision is not Pass.FULL
            probed = decision is Pass.PROBE and references.reuse
            references.threshold = self.policy.threshold if probed else None
            groups.append(references)
        if slot.outside is not None:
            alone = not groups or groups[0].reuse
            groups.append(slot.outside.plan(self.policy, step, alone))
        return groups

    def _commit(
        self, slot: Slot, groups: Sequence[Group], step: int, sigma: float
    ) -> Callable[[], None]:
        """What is done once the pass, and whatever is repeated with it, has succeeded."""
        done = [(group, group.reuse, group.drift) for group in groups]

        def commit() -> None:
            slot.dirty, slot.step, slot.sigma = False, step, sigma
            for group, reuse, drift in done:
                group.known = True
                self.record.drifted(group.name, drift)
                if not reuse and group is groups[0]:
                    slot.recorded_at = step
            if slot.outside is not None:
                slot.outside.commit(step)
            self.record.passed(step, full=not any(reuse for _, reuse, _ in done))
            self.record.holds(self.slots.bytes_held())

        return commit

    def _give_up(self, groups: Sequence[Group]) -> None:
        """Some blocks did not come by. Raises RuntimeError where the picture has suffered."""
        if any(group.reuse for group in groups):
            raise RuntimeError(BROKEN)
        self.off = NO_ATTENTION
        self._aside(NO_ATTENTION, self.causal)
        self.slots.clear()

    def _aside(self, reason: str, not_causal: bool = False) -> None:
        """Tell why a pass reused nothing, and that it was not causal either."""
        self.record.stand_aside(reason)
        self.record.note(NOT_CAUSAL if not_causal else "")

    # ------------------------------------------------------------------------------ identity
    def _identity(
        self, arguments: Sequence[Any], options: Options, method: str
    ) -> tuple[Key, list[Any]]:
        """Which slot a call has, and what its keys and values depend on besides the step."""
        x, _, context, mask, references, condition = arguments
        sides = zip_longest(options.get("uuids", ()), options.get("cond_or_uncond", ()))
        key = Key(x.device, part_of(options), tuple(sides), tuple(x.shape))
        attention = foreign_in(options)  # perturbed guidance has another one in its own passes
        return key, [references, condition, method, x.dtype, context, mask, attention]

    def _slot(self, arguments: Sequence[Any]) -> Slot:
        """An empty one for such a call."""
        x, slot = arguments[0], Slot([])
        if arguments[4]:
            store = new_store(self.store_format, self.place, x.device)
            slot.references = Group(REFERENCES, references_of(arguments), store)
        tokens = self.region.outside(x) if self.region is not None else None
        if tokens is not None:
            store = new_store(self.store_format, self.place, x.device)
            slot.outside = Outside(tokens, store, self.region)
        return slot

    def _function(self) -> bool:
        """Whether another node's function calls the model."""
        return foreign.FUNCTION in getattr(self.guider, "model_options", {})

    def _step(self, options: Options, before: int | None = None) -> int:
        """Of the schedule; `before`: that of the pass before."""
        return step_of(_sigma(options), self.policy.sigmas, before or 0)


def _sigma(options: Options) -> float:
    """At which the model is called."""
    return float(options["sigmas"].max())


def _went_back(step: int, before: int | None) -> bool:
    """Whether a sampler begins anew, or goes back further than any does from a look ahead."""
    return before is not None and step < before and (step == 0 or before - step > LOOKAHEAD)


def _on_success(options: Options, act: Callable[[], None]) -> None:
    """Now, or when what repeats failed passes (passes.py) knows that this one counts."""
    if ON_SUCCESS in options:
        options[ON_SUCCESS].append(act)
    else:
        act()
