"""One device of a run: which rung of the ladder its forward passes have reached, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..core import budget
from ..core.budget import CHANGED, EXACT, ROUNDING, Memory, Plan, Rung, Work
from ..core.budget_text import Attempt
from ..core.measured import Measured
from .store import FOLDER
from .workload import Dequantized, Holding, dequantized_of, key_of, weights_of

MEASURED = Measured(FOLDER / "forward_passes.json")
FLUCTUATION_BYTES = 256_000_000  # less than this is no other program
AMPLE = 1.25  # times the need
TELLING = ("cuda",)  # kinds of device that tell what is free


@dataclass
class Place:
    """One device of a run: the pass that runs on it, and which rung it has reached."""

    patcher: ModelPatcher
    model: BaseModel
    sliced: bool  # whether it can run in slices
    holdings: Sequence[Holding] = ()
    work: Work | None = None
    held: bool = False  # whether other patches hold something
    rungs: tuple[Rung, ...] = ()
    index: int = 0
    last_exact: int = 0
    passed: set[str] = field(default_factory=set)  # ids of rungs that this run has left behind
    attempts: dict[str, Attempt] = field(default_factory=dict)  # that failed, by the same ids
    doubted: set[Plan] = field(default_factory=set)  # did not fit though it should: make more room
    reachable: int = 0  # the most bytes that this run could have had so far
    failures: int = 0  # of the pass that runs
    repeats: int = 0  # of it on the same rung, to which nothing follows
    waited: float = 0.0  # seconds, for this pass
    dequantized: Dequantized = field(init=False)
    weights: str = field(init=False)  # how they are stored

    def __post_init__(self) -> None:
        """Look at the layers once in a run."""
        self.dequantized = dequantized_of(self.model, self.patcher.load_device)
        self.weights = weights_of(self.model)

    @property
    def rung(self) -> Rung:
        """The one that runs."""
        return self.rungs[self.index]

    @property
    def stop(self) -> int:
        """How many rungs there are of those that are exact, or of all once they have failed."""
        return self.last_exact + 1 if self.index <= self.last_exact else len(self.rungs)

    def need(self) -> int:
        """Bytes that the pass is predicted to need."""
        return budget.need(self.work, self.rung.plan, self.factor(self.rung.plan))

    def key(self, plan: Plan) -> str:
        """Under which name corrections of this prediction are kept."""
        return key_of(self.model, self.weights, self.patcher.load_device, plan)

    def factor(self, plan: Plan) -> float:
        """The correction, learned from earlier runs."""
        return MEASURED.factor(self.key(plan))

    def need_of(self, work: Work, policy: str, memory: Memory) -> int:
        """What a pass needs on the first rung that should fit."""
        self.begin(work, policy, memory)
        return self.need()

    def begin(self, work: Work, policy: str, memory: Memory) -> None:
        """Take up a new pass, on the first rung that should fit of those not left behind."""
        held = memory.held > 0
        work = replace(work, fixed=work.fixed + self.dequantized.of(work))
        if (work, held) != (self.work, self.held):
            ladder = budget.ladder(work, policy, held)
            self.rungs = tuple(rung for rung in ladder if rung.exactness != CHANGED)
            self.work, self.held = work, held
            exact = [i for i, r in enumerate(self.rungs) if r.exactness in (EXACT, ROUNDING)]
            self.last_exact = exact[-1]
        self.failures, self.repeats, self.waited = 0, 0, 0.0
        behind = [i for i, rung in enumerate(self.rungs) if rung.id in self.passed]
        self._choose(memory, min(max(behind, default=-1) + 1, len(self.rungs) - 1))

    def _choose(self, memory: Memory, start: int) -> None:
        """The first rung from `start` that should fit and has not run out in an earlier run; no
        approximation before all that is exact has failed."""
        stop = self.last_exact + 1 if start <= self.last_exact else len(self.rungs)
        rungs = self.rungs[:stop]
        self.index = budget.choose(rungs, self.work, memory, self.factor, start)
        while self.index < stop - 1 and self._ran_out_before(memory):
            self.doubted.add(self.rung.plan)
            self.index = budget.choose(rungs, self.work, memory, self.factor, self.index + 1)
            self.passed |= {rung.id for rung in rungs[: self.index]}
        self.reachable = max(self.reachable, _all_of(memory))

    def _ran_out_before(self, memory: Memory) -> bool:
        needed = budget.need(self.work, self.rung.plan)
        return MEASURED.fails(self.key(self.rung.plan), needed, budget.room(self.rung, memory))

    def fail(self, memory: Memory) -> bool:
        """Note that the pass ran out; whether to repeat it on the same rung.

        Only the first time in a run, where the numbers say that it fits: what it left behind and
        the pieces of memory in torch's cache are gone then.
        """
        first = not self.attempts
        attempt = Attempt(self.rung, self.need(), budget.room(self.rung, memory))
        self.attempts[self.rung.id] = attempt
        self.doubted.add(self.rung.plan)
        self.failures += 1
        after = self.following(memory, self.stop)
        more_room = after is not None and self.rungs[after].plan == self.rung.plan
        return first and not more_room and attempt.needed <= attempt.available

    def following(self, memory: Memory, stop: int) -> int | None:
        """The rung before `stop` that promises more than the one that failed."""
        lowest = min(attempt.needed for attempt in self.attempts.values())
        rungs = self.rungs[:stop]
        return budget.following(rungs, self.work, memory, self.index, lowest, self.factor)

    def descend(self, index: int, memory: Memory) -> None:
        """Leave all rungs before this one behind. Where no other program took memory, later runs
        know that this one did not fit."""
        if self.patcher.load_device.type in TELLING and not self.robbed(memory):
            needed = budget.need(self.work, self.rung.plan)
            MEASURED.ran_out(self.key(self.rung.plan), needed, budget.room(self.rung, memory))
        self.passed |= {rung.id for rung in self.rungs[:index]}
        self.index, self.repeats = index, 0

    def gave_back(self, memory: Memory) -> bool:
        """Whether there is clearly more than the pass needs, although it has just run out: what
        another program took is back by now. Only of devices that tell what is free."""
        room = budget.room(self.rung, memory)
        return self.patcher.load_device.type in TELLING and self.need() * AMPLE <= room

    def robbed(self, memory: Memory) -> bool:
        """Whether another program has taken memory since the run began."""
        return _all_of(memory) < self.reachable - FLUCTUATION_BYTES


def _all_of(memory: Memory) -> int:
    """Bytes that there are once whatever can leave has left; patches' holdings are ours."""
    return memory.free + memory.others + memory.streamable
