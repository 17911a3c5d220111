"""On a card: no bit differs without reuse, pinned RAM gives the GPU's bits, memory comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.benchmarks import full_size_checkpoints as files
from pack.core.reference_store import FORMATS, bytes_of
from pack.demo.server import Result, Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, HEADS, WIDTH = 8, 24, 128  # of the transformer, at its full width: 2.7 GB
SIDE, STEPS, MANY = 768, 4, 400
TOKENS = (SIDE // 16) ** 2  # of one reference of the picture's size
SMALL = 32 * 2**20  # bytes: what two runs may differ in that has nothing to do with the store
VRAM = {"dynamic": (), "not dynamic": ("--disable-dynamic-vram",)}
Graph = dict[str, Any]


@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short transformer of full width, and the benchmark's nodes."""
    base = tmp_path_factory.mktemp("references")
    target = base / "custom_nodes" / "tiled_edit_nodes"
    shutil.copytree(ROOT / "benchmarks" / "tiled_edit_nodes", target)
    command = [sys.executable, "-m", "benchmarks.full_size_checkpoints", str(base / "models")]
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(comfyui)])
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": paths}
    subprocess.run([*command, str(LAYERS)], cwd=ROOT, env=environment, check=True)
    (base / "web").mkdir()
    (base / "web" / "index.html").touch()
    return base


@pytest.fixture(scope="module", params=list(VRAM))
def running(request: pytest.FixtureRequest, comfyui: Path, base: Path) -> Iterator[Server]:
    """A server; a first run is done, whose attention takes another kernel."""
    extra = ["--front-end-root", str(base / "web"), *VRAM[request.param]]
    with Server(comfyui, base, ROOT, cpu=False, extra_args=extra) as server:
        assert server.submit(sampling(1)).status == "success"
        yield server


def sampling(number: int, references: int = 1, steps: int = STEPS, **cache: Any) -> Graph:
    """A few steps with references of the picture's size, as stock or with the cache."""
    texts = {"width": 3584, "references": " ".join([f"{SIDE}x{SIDE}"] * references)}
    graph = {
        "unet": node(
            "UNETLoader", unet_name=files.TRANSFORMER.split("/")[1], weight_dtype="default"
        ),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "text": node("BenchConditions", tokens=73, **texts),
        "other": node("BenchConditions", tokens=41, **texts),
        "latent": node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    if cache:
        inputs = {
            **{"model": ["shift", 0], "refresh": "every n steps", "refresh_every": 10},
            **{"drift_threshold": 0.1, "full_last_steps": 0, "causal": False, "region": False},
            **{"store_format": "model", "store_place": "gpu"},
            **{"region_margin": 64, "region_threshold": 0.05},
        }
        graph["cache"] = node("QwenVRAMReferenceCache", **{**inputs, **cache})
    model = ["cache" if cache else "shift", 0]
    graph["measure"] = node("BenchMeasure", model=model, number=number)
    graph["sampler"] = node(
        "KSampler",
        **{"model": ["measure", 0], "positive": ["text", 0], "negative": ["other", 0]},
        **{"latent_image": ["latent", 0], "seed": 7, "steps": steps, "cfg": 2.0, "denoise": 1.0},
        **{"sampler_name": "euler", "scheduler": "simple"},
    )
    graph["report"] = node("BenchReport", measure=["measure", 1], after=["sampler", 0])
    graph["saved"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/cache")
    return graph


def latent(server: Server, result: Result) -> torch.Tensor:
    """What was saved."""
    from safetensors.torch import load_file

    assert result.status == "success", result.error
    (saved,) = result.outputs["saved"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    return load_file(path)["latent_tensor"]


def measured(result: Result) -> dict[str, Any]:
    """What the measure around the sampler saw."""
    assert result.status == "success", result.error
    return next(run for run in result.outputs["report"]["bench"] if run["steps"])


def test_every_step_in_full_changes_no_bit(running: Server) -> None:
    stock = latent(running, running.submit(sampling(2)))
    again = latent(running, running.submit(sampling(3)))
    assert again.equal(stock)  # so stock itself is reproducible, and equality means something
    for number, format in enumerate(FORMATS, 4):
        full = running.submit(sampling(number, refresh_every=1, store_format=format))
        assert latent(running, full).equal(stock), format
    zero = {"refresh": "when drifted", "drift_threshold": 0.0}
    assert latent(running, running.submit(sampling(9, **zero))).equal(stock)


@pytest.mark.parametrize("format", FORMATS)
def test_pinned_memory_gives_the_bits_of_the_gpu(running: Server, format: str) -> None:
    stock = latent(running, running.submit(sampling(10, references=2)))
    found = {}
    for number, place in enumerate(("gpu", "ram"), 11):
        graph = sampling(number, 2, store_format=format, store_place=place)
        found[place] = latent(running, running.submit(graph))
    assert found["ram"].equal(found["gpu"])
    error = float((found["gpu"] - stock).norm() / stock.norm())
    warnings.warn(f"{format}, reused three times: relative difference {error:.1e}", stacklevel=1)
    assert 0 < error < 0.5  # reused, and no nonsense


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_held_is_what_was_calculated(running: Server, format: str) -> None:
    stock = measured(running.submit(sampling(20)))["held"][1]
    own = measured(running.submit(sampling(21, store_format=format)))["held"][1]
    shape = (1, HEADS, TOKENS, WIDTH)
    wanted = 2 * 2 * LAYERS * bytes_of(format, shape, torch.bfloat16)
    warnings.warn(f"{format}: held {(own - stock) / wanted:.3f} of calculated", stacklevel=1)
    assert abs(own - stock - wanted) < 0.05 * wanted


def test_memory_comes_back_after_a_run_and_an_interrupt(running: Server) -> None:
    before = measured(running.submit(sampling(30)))["after"]
    assert abs(measured(running.submit(sampling(31, store_place="gpu")))["after"] - before) < SMALL
    ended = running.submit(sampling(32, steps=MANY, store_place="gpu"), Interrupt(running))
    assert ended.status == "interrupted", ended
    assert abs(measured(running.submit(sampling(33)))["before"] - before) < SMALL
    ended = running.submit(sampling(34, steps=MANY, store_place="ram"), Interrupt(running))
    assert ended.status == "interrupted", ended
    assert abs(measured(running.submit(sampling(35)))["after"] - before) < SMALL


class Interrupt:
    """Asks ComfyUI to stop after the second step."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """At each event of the prompt."""
        if event == "progress" and data.get("value") == 3:
            self.server.post_json("/interrupt", {})
