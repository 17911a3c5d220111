"""On a card: quantised models compute the same resident and streamed, with LoRAs and without."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.tests.conftest import ROOT
from pack.tests.gpu import quantized_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
VRAM = {"dynamic": "UnmergedDynamicPatcher", "not dynamic": "UnmergedPatcher"}


@pytest.fixture(scope="module", params=list(VRAM))
def found(
    request: pytest.FixtureRequest, comfyui: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """What a ComfyUI with this kind of VRAM found, by format."""
    base = tmp_path_factory.mktemp("quantized")
    script = [sys.executable, quantized_cases.__file__, comfyui, base, ROOT, request.param, "cuda"]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, cwd=base)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    facts = json.loads((base / "found.json").read_text())
    warnings.warn(f"{request.param}: {json.dumps(facts)}", stacklevel=1)
    return request.param, facts


@pytest.mark.parametrize("format", quantized_cases.FORMATS)
def test_where_the_weights_lie_changes_no_bit(found, format) -> None:
    kind, facts = found[0], found[1][format]
    assert facts["kind"] == VRAM[kind]
    assert facts["finite"] and facts["streamed"] and facts["streamed_lora"] and facts["reloaded"]
    assert facts["resident"] > 0.8 * facts["bytes"] > facts["resident_streamed"]


@pytest.mark.parametrize("format", quantized_cases.FORMATS)
def test_a_lora_comes_and_goes(found, format) -> None:
    facts = found[1][format]
    assert facts["changed"] > 0.005
    assert facts["removed"] and facts["zero"] and facts["again"]
    assert facts["not dynamic"] and facts["kind of it"] == "UnmergedPatcher"


@pytest.mark.parametrize("format", quantized_cases.FORMATS)
def test_what_is_evicted_leaves_nothing_on_the_card(found, format) -> None:
    kind, facts = found[0], found[1][format]
    assert facts["factors"] > 0 and facts["factors_after"] == 0
    assert facts["factors between runs"] == (0 if kind == "dynamic" else facts["factors"])
    assert facts["loaded_after"] < 0.01 * facts["bytes"]
