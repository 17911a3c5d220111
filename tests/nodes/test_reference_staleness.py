"""No keys and values of another run, ever: whatever came before, the picture is a fresh process's.

Each case runs in a ComfyUI that goes on and on, on a model and a cache that others have used, and is
compared bit for bit with a process of its own (reference_cases.py).
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.host import RunError
from pack.tests.nodes.faults import transformer
from pack.tests.nodes.reference_cases import CASES, latents, write_pictures
from torch import Tensor

OTHERS = [name for name in CASES if name != "as it is"]
PASS_OF_STEP_3 = 5  # two sides of CFG each: in step 2 and 3 references are reused


@pytest.fixture(scope="module")
def expected(fresh_pictures: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """What a fresh process makes of every case."""
    return fresh_pictures


class Watch:
    """Sees the stores of the loaded pack: how often they were read, and which are alive."""

    def __init__(self, store: type, monkeypatch: Any) -> None:
        self.read, self.stores = 0, weakref.WeakSet()
        make, extend = store.__init__, store.extend

        def init(own: Any, *arguments: Any) -> None:
            make(own, *arguments)
            self.stores.add(own)

        def extended(own: Any, *arguments: Any) -> Any:
            self.read += 1
            return extend(own, *arguments)

        monkeypatch.setattr(store, "__init__", init)
        monkeypatch.setattr(store, "extend", extended)


@pytest.fixture(scope="module")
def going_on(host: Any, expected: Any) -> Any:
    """ComfyUI with empty caches, which no test of this module empties again."""
    host.forget_everything()
    write_pictures(host.base)
    return host


@pytest.fixture
def watch(going_on: Any, monkeypatch: Any) -> Iterator[Watch]:
    """Afterwards nothing of a store is alive, and nobody is told of one."""
    made = Watch(going_on.part("core.reference_store").KVStore, monkeypatch)
    yield made
    gc.collect()
    assert list(made.stores) == []
    memory = going_on.part("nodes.reference_memory")
    assert memory.held_on(torch.device("cpu")) == 0 and len(memory._stores) == 0


def run(host: Any, watch: Watch, case: str) -> dict[str, Tensor]:
    """By the name of case and node. What was kept was used, and is gone without the collector."""
    before = watch.read
    gc.disable()
    try:
        found = latents(host.run(CASES[case]))
        assert sum(store.bytes_held["ram"] for store in watch.stores) == 0
    finally:
        gc.enable()
    assert found and watch.read > before
    return {f"{case}/{name}": latent for name, latent in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, latent in found.items():
        assert torch.equal(latent, expected[name]), name


def test_whatever_ran_before_the_picture_is_a_fresh_process_s(going_on, watch, expected) -> None:
    """From the first case to each other, and back to it; in the other order than there."""
    found = []
    for case in reversed(OTHERS):
        found += [run(going_on, watch, "as it is"), run(going_on, watch, case)]
    for each in found:
        assert_same(each, expected())
    names = list(expected())
    for first, second in itertools.combinations(names, 2):  # what is compared tells them apart
        assert not torch.equal(expected()[first], expected()[second]), (first, second)


@contextmanager
def acting(host: Any, at: int, act: Callable[[], None]) -> Iterator[SimpleNamespace]:
    """Calls `act` in the middle of the forward pass with this number."""
    model = transformer(host, CASES["as it is"])
    seen = SimpleNamespace(passes=0)

    def hook(*_: Any) -> None:
        seen.passes += 1
        if seen.passes == at:
            act()

    handle = model.transformer_blocks[1].register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def interrupt() -> None:
    """As the button does."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)


def fail() -> None:
    """As another node's patch may."""
    raise KeyError("of another kind")


# Both ways to end occur where references are reused, each kind of run follows once or twice; not
# every combination, since each takes two runs.
@pytest.mark.parametrize(
    ("act", "at", "after"),
    [
        (interrupt, 1, "as it is"),
        (fail, 2, "another prompt"),
        (interrupt, PASS_OF_STEP_3, "two sizes"),
        (fail, PASS_OF_STEP_3, "as it is"),
    ],
)
def test_a_run_that_ended_midway_leaves_nothing(
    going_on, watch, expected, act: Callable[[], None], at: int, after: str
) -> None:
    with acting(going_on, at, act), pytest.raises(RunError):
        going_on.run(CASES["another seed"])
    assert sum(store.bytes_held["ram"] for store in watch.stores) == 0
    assert_same(run(going_on, watch, after), expected())


def test_an_interrupt_within_the_second_of_two_runs(going_on, watch, expected) -> None:
    with acting(going_on, 13, interrupt), pytest.raises(RunError):
        going_on.run(CASES["two sizes"])
    found = run(going_on, watch, "as it is")
    assert_same({**found, **run(going_on, watch, "two sizes")}, expected())


@pytest.mark.parametrize(("case", "at"), [("another picture", 2), ("two samplers", PASS_OF_STEP_3)])
def test_the_memory_manager_unloads_the_model_midway(
    going_on, watch, expected, at: int, case: str
) -> None:
    import comfy.model_management

    unloaded: list[int] = []

    def unload() -> None:
        unloaded.append(len(comfy.model_management.current_loaded_models))
        comfy.model_management.unload_all_models()

    with acting(going_on, at, unload):
        assert_same(run(going_on, watch, case), expected())
    assert unloaded and unloaded[0] > 0
    assert_same(run(going_on, watch, "as it is"), expected())


def test_comfyui_clears_everything_between_two_runs(going_on, watch, expected) -> None:
    """As the button in its menu does: the stores have died with their runs, and nothing is left."""
    import comfy.model_management

    run(going_on, watch, "a batch")
    comfy.model_management.unload_all_models()
    assert_same(run(going_on, watch, "as it is"), expected())
    assert_same(run(going_on, watch, "a batch"), expected())
