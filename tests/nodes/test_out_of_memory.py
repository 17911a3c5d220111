"""Out of memory injected wherever it can happen: the same picture, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.tests.host import RunError
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, transformer, within

SAMPLERS = ["euler", "dpmpp_2m", "uni_pc", "dpmpp_sde"]
CALLS = 2 * 2 * 2  # blocks, sides of CFG, steps


@pytest.fixture(scope="module")
def stock(host) -> dict[str, torch.Tensor]:
    """What ComfyUI's own sampler makes, by its algorithm."""
    host.forget_everything()
    return {name: latent(host.run(small(name))) for name in SAMPLERS}


@pytest.fixture
def model(host, stock) -> torch.nn.Module:
    """The transformer that all runs of this module share, without what earlier runs cached."""
    host.restart()
    return transformer(host, small())


def again(host: Any, graph: dict[str, Any]) -> Any:
    """Run it though it ran before."""
    host.restart()
    return host.run(graph)


@pytest.mark.parametrize("at", range(CALLS))
def test_a_failure_at_any_block_of_any_step_changes_nothing(host, model, stock, at: int) -> None:
    with blocks_fail(model, Faults({at})) as faults:
        run = host.run(within(small()))
    assert faults.raised == 1 and latent(run).equal(stock["euler"])
    status = run.status("sampler")
    assert status["forward_passes_repeated"] == 1 and status["exactness"] == "exact"
    assert [ref for ref in faults.tensors if ref() is not None] == []
