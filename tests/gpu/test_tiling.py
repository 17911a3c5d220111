"""On a card: tiles blend as on the CPU, one tile changes nothing, and tiles fit where whole fails."""

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
from pack.benchmarks.text_to_image import small_card
from pack.core.tiling import WINDOWS, TileBlender, TileGrid, crop
from pack.demo.server import Result, Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS = 8  # of the transformer, at its full width: 2.7 GB
LARGE = 3072
SMALL_CARD = 4.4  # GiB: the activations of an untiled pass with one reference take 4.7
VRAM = {"dynamic": (), "not dynamic": ("--disable-dynamic-vram",)}
Graph = dict[str, Any]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_blend_on_the_card_as_on_the_cpu(window: str, dtype: torch.dtype) -> None:
    grid = TileGrid.cover(388, 250, 128, 16)
    draw = torch.Generator().manual_seed(5)
    shape = (2, 16, 1, grid.height, grid.width)
    whole = torch.randn(shape, generator=draw).to(dtype)
    own = {device: TileBlender(grid, shape, window, device=device) for device in ("cpu", "cuda")}
    for index, tile in enumerate(grid.tiles()):
        changed = crop(whole, tile) * (1 + index / 10)  # tiles that disagree, so that weights count
        for device, blender in own.items():
            blender.add(index, changed.to(device))
    result = own["cuda"].result()
    assert result.device.type == "cuda" and result.dtype == torch.float32
    torch.testing.assert_close(result.cpu(), own["cpu"].result(), rtol=0, atol=1e-5)


def test_what_is_given_back_is_the_whole_on_the_card() -> None:
    grid = TileGrid.cover(517, 301, 128, 30)
    whole = torch.rand(1, 3, 517, 301, device="cuda")
    blender = TileBlender(grid, whole.shape, device="cuda")
    for index, tile in enumerate(grid.tiles()):
        blender.add(index, crop(whole, tile))
    torch.testing.assert_close(blender.result(), whole, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------- on a server
@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short transformer of full width, and the benchmark's nodes."""
    base = tmp_path_factory.mktemp("tiling")
    for name in ("small_card", "tiled_edit_nodes"):
        shutil.copytree(ROOT / "benchmarks" / name, base / "custom_nodes" / name)
    command = [sys.executable, "-m", "benchmarks.full_size_checkpoints", str(base / "models")]
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(comfyui)])
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": paths}
    subprocess.run([*command, str(LAYERS)], cwd=ROOT, env=environment, check=True)
    (base / "web").mkdir()
    (base / "web" / "index.html").touch()
    return base


@pytest.fixture(scope="module", params=list(VRAM))
def running(request: pytest.FixtureRequest, comfyui: Path, base: Path) -> Iterator[Server]:
    """A server on a small card; a first run is done, whose attention takes another kernel."""
    extra = ["--front-end-root", str(base / "web"), *VRAM[request.param]]
    try:
        with (
            small_card(SMALL_CARD),
            Server(comfyui, base, ROOT, cpu=False, extra_args=extra) as server,
        ):
            assert server.submit(sampling(1024, tile=None, seed=1)).status == "success"
            yield server
    finally:
        os.environ.pop("QWEN_VRAM_CARD_GIB", None)


def sampling(side: int, tile: int | None, seed: int = 7, batch: int = 0) -> Graph:
    """Two steps with a reference of the picture's own size, whole or in tiles."""
    graph = {
        "unet": node(
            "UNETLoader", unet_name=files.TRANSFORMER.split("/")[1], weight_dtype="default"
        ),
        "model": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "text": node("BenchConditions", tokens=60, width=3584, references=f"{side}x{side}"),
        "other": node("BenchConditions", tokens=40, width=3584, references=f"{side}x{side}"),
        "latent": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
    }
    model = "model"
    if tile:
        references = dict.fromkeys(("reference_1", "reference_2", "other_references"), "auto")
        how = {"tile_size": tile, "overlap": 128, "window": "hann", "tile_batch": batch}
        tiles = node("QwenVRAMTiledDiffusion", **{"model": ["model", 0], **how, **references})
        graph["tiles"], model = tiles, "tiles"
    graph["measure"] = node("BenchMeasure", model=[model, 0], number=seed)
    graph["sampler"] = node(
        "KSampler",
        **{"model": ["measure", 0], "positive": ["text", 0], "negative": ["other", 0]},
        **{"latent_image": ["latent", 0], "seed": seed, "steps": 2, "cfg": 2.0, "denoise": 1.0},
        **{"sampler_name": "euler", "scheduler": "simple"},
    )
    graph["report"] = node("BenchReport", measure=["measure", 1], after=["sampler", 0])
    graph["saved"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/tiling")
    return graph


def latent(server: Server, result: Result) -> torch.Tensor:
    """What was saved."""
    from safetensors.torch import load_file

    assert result.status == "success", result.error
    (saved,) = result.outputs["saved"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    return load_file(path)["latent_tensor"]


def test_one_tile_that_covers_everything_changes_no_bit(running: Server) -> None:
    whole = latent(running, running.submit(sampling(1024, tile=None)))
    tiled = latent(running, running.submit(sampling(1024, tile=1024)))
    assert tiled.equal(whole)
    several = latent(running, running.submit(sampling(1024, tile=512)))
    assert not several.equal(whole)  # so tiles do take part


def test_several_tiles_in_a_pass_are_what_one_by_one_gives(running: Server) -> None:
    one = latent(running, running.submit(sampling(1536, tile=1024, batch=1)))
    four = latent(running, running.submit(sampling(1536, tile=1024, batch=4)))
    error = float((four - one).norm() / one.norm())
    warnings.warn(f"4 tiles in a pass: relative difference {error:.1e}", stacklevel=1)
    assert error < 6e-2  # with random weights another kernel alone makes 4.5e-2


def test_tiles_fit_where_the_whole_picture_does_not(running: Server) -> None:
    tiled = running.submit(sampling(LARGE, tile=1024))
    made = latent(running, tiled)
    (measured,) = tiled.outputs["report"]["bench"]
    warnings.warn(f"in tiles: {measured['peak'] / 1e9:.2f} GB", stacklevel=1)
    assert torch.isfinite(made).all() and made.shape[-2:] == (LARGE // 8, LARGE // 8)
    # Last of all: what a failure leaves on a model of stock's makes the next runs fail, too.
    whole = running.submit(sampling(LARGE, tile=None))
    assert whole.status == "error" and "out of memory" in whole.error.lower(), whole
