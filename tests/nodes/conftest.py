"""What holds for every module of tests that run in ComfyUI's process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from pack.tests.host import Host


@pytest.fixture(scope="module", autouse=True)
def forgotten(host: Host) -> Iterator[None]:
    """Afterwards the host knows no model of the module's tests. Clones that failed on purpose end
    in a cycle with their error; ComfyUI then keeps a dead entry for a model that still lives.

    What is alive before it stays: libraries that were imported on the way, above all. Tests and
    nodes collect garbage thousands of times, which takes ten times as long if it looks at those
    too. No model may be among it: let go later, it would never be collected, and ComfyUI's list
    keep it. So not at the end of a module, where the arguments of its last test still live.
    """
    from comfy import model_management

    gc.collect()
    gc.freeze()
    yield
    host.part("nodes.loaders").REGISTRY.release()
    host.executor.reset()
    model_management.unload_all_models()
    gc.collect()
    loaded = model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if not entry.is_dead()]
