"""On a card: each format gives the CPU's numbers, and the same picture however it is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.benchmarks import large_files
from pack.benchmarks.small_machine import Gauge
from pack.benchmarks.text_to_image import device_bytes_used
from pack.core.quantization import FORMATS
from pack.core.quantized_layers import decode, encode
from pack.demo.server import Result, Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, SIDE, STEPS = 6, 512, 2  # of the transformer, at its full width: 4.2 GB in bf16
TEXT_WIDTH = 3584
CHOICES = ("bnb_nf4", "bnb_fp4", "bnb_int8", "int8", "int4")
VRAM = {"dynamic": (), "legacy": ("--disable-dynamic-vram",)}
ROOM = 0.8  # GB for torch under a limit: less than the six blocks and what a pass needs
FACTOR = 0.02  # by how much the errors on card and CPU may differ
ROUNDED = 0.06  # relative: what other kernels make of random weights after two steps
Graph = dict[str, Any]


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("shape", [(384, 3072), (100, 12288)])
def test_the_card_quantises_as_the_cpu(format: str, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=draw) * 0.02).bfloat16()
    on = {device: encode(weight.to(device), format) for device in ("cpu", "cuda")}
    made = {d: decode(entries, torch.bfloat16).cpu().float() for d, entries in on.items()}
    errors = {
        d: float((w - weight.float()).norm() / weight.float().norm()) for d, w in made.items()
    }
    moved = {name: entry.to("cuda") for name, entry in on["cpu"].items()}
    again = decode(moved, torch.bfloat16).cpu().float()
    gap = float((again - made["cpu"]).norm() / weight.float().norm())
    warnings.warn(f"{format} {shape}: {errors}, the same entries {gap:.1e}", stacklevel=1)
    assert abs(errors["cuda"] / errors["cpu"] - 1) < FACTOR
    assert gap < 0.005  # the rounding of bf16


# ---------------------------------------------------------------------------------- on a server
@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short transformer of full width in bf16, a LoRA, the benchmark's nodes."""
    base = tmp_path_factory.mktemp("quantised")
    target = base / "custom_nodes" / "tiled_edit_nodes"
    shutil.copytree(ROOT / "benchmarks" / "tiled_edit_nodes", target)
    command = [sys.executable, "-m", "benchmarks.large_files", str(base / "models"), str(LAYERS)]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (base / "web").mkdir()
    (base / "web" / "index.html").touch()
    return base


@pytest.fixture(scope="module")
def before() -> int:
    """Bytes of the card that others use."""
    return device_bytes_used()


@pytest.fixture(scope="module", params=list(VRAM))
def running(
    request: pytest.FixtureRequest, comfyui: Path, base: Path, before: int
) -> Iterator[Server]:
    """A server; a first run is done, whose attention takes another kernel."""
    extra = ["--front-end-root", str(base / "web"), *VRAM[request.param]]
    with Server(comfyui, base, ROOT, cpu=False, extra_args=extra) as server:
        latent(server, sampling("bnb_nf4"))
        yield server


@pytest.fixture(scope="module")
def limit(running: Server, before: int) -> float:
    """GB: what CUDA and its libraries take in the process, which counts too, and ROOM.

    With a number for both, as 1.2, little or nothing is left where the libraries are large.
    """
    let_go(running)
    time.sleep(2)  # the queue obeys when it is idle
    taken = (device_bytes_used() - before) / 1e9
    warnings.warn(f"without a model the process takes {taken:.2f} GB", stacklevel=1)
    return round(max(0.0, taken) + ROOM, 2)


def loader(weight_dtype: str, file: str = "", preset: str = "balanced") -> dict[str, Any]:
    """Our loader."""
    own = {"device": "default", "keep_loaded": False, "preset": preset}
    name = file or large_files.SHORT.split("/")[1]
    return node("QwenVRAMLoadDiffusionModel", unet_name=name, weight_dtype=weight_dtype, **own)


def sampling(
    weight_dtype: str,
    *strengths: float,
    limit: float = 0.0,
    number: int = 0,
    file: str = "",
    sampler: str = "sampler",
) -> Graph:
    """A few steps; with the LoRA once for each strength. Another `number` samples again."""
    last = f"{sampler}_unet"
    graph = {
        last: loader(weight_dtype, file),
        "text": node("BenchConditions", tokens=73, width=TEXT_WIDTH, references=""),
        "other": node("BenchConditions", tokens=41, width=TEXT_WIDTH, references=""),
        "latent": node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    for place, strength in enumerate(strengths):
        names = {"lora_name": large_files.SHORT_LORA.split("/")[1], "strength_model": strength}
        graph[f"{sampler}_lora{place}"] = node("LoraLoaderModelOnly", model=[last, 0], **names)
        last = f"{sampler}_lora{place}"
    graph[f"{sampler}_shift"] = node("ModelSamplingAuraFlow", model=[last, 0], shift=3.1)
    measured = {"model": [f"{sampler}_shift", 0], "number": number}
    graph[f"{sampler}_measure"] = node("BenchMeasure", **measured)
    graph[sampler] = node(
        "QwenVRAMSampler",
        **{"model": [f"{sampler}_measure", 0], "positive": ["text", 0], "negative": ["other", 0]},
        **{"latent_image": ["latent", 0], "seed": 7, "steps": STEPS, "cfg": 2.0, "denoise": 1.0},
        **{"sampler_name": "euler", "scheduler": "simple", "policy": "exact only"},
        **{"vram_limit": limit, "settings": "0: 20, 5, ddim"},
    )
    graph[f"{sampler}_saved"] = node(
        "SaveLatent", samples=[sampler, 0], filename_prefix="latents/quantised"
    )
    return graph


def latent(server: Server, graph: Graph, sampler: str = "sampler") -> torch.Tensor:
    """What a prompt makes."""
    return saved(server, server.submit(graph), sampler)


def saved(server: Server, result: Result, sampler: str = "sampler") -> torch.Tensor:
    """The latent of one sampler."""
    from safetensors.torch import load_file

    assert result.status == "success", result.error
    (file,) = result.outputs[f"{sampler}_saved"]["latents"]
    made = load_file(server.base / "output" / file["subfolder"] / file["filename"])
    assert made["latent_tensor"].isfinite().all()
    return made["latent_tensor"]


def close(server: Server, graph: Graph, wanted: torch.Tensor, what: str) -> None:
    """A run under a VRAM limit: bit for bit if the sampler says so, else within rounding."""
    result = server.submit(graph)
    made = saved(server, result)
    (status,) = result.outputs["sampler"]["qwen_vram"]
    text = f"{what}: {status['exactness']}, relative difference {difference(made, wanted):.1e}"
    warnings.warn(f"{text}: {status}", stacklevel=1)
    exact = status["exactness"] == "exact"
    assert made.equal(wanted) if exact else difference(made, wanted) < ROUNDED, text


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, L2."""
    return float((one - other).norm() / other.norm())


def let_go(server: Server, forget: bool = True) -> None:
    """Everything out of VRAM, and with `forget` out of RAM too."""
    server.post_json("/free", {"unload_models": True, "free_memory": forget})


@pytest.mark.parametrize("choice", CHOICES)
def test_loras_come_and_go_resident_streamed_and_evicted(
    running: Server, limit: float, choice: str
) -> None:
    plain = latent(running, sampling(choice, number=1))
    assert latent(running, sampling(choice, number=2)).equal(plain)
    assert latent(running, sampling(choice, 0.0, number=3)).equal(plain)  # strength 0: no bit
    with_lora = latent(running, sampling(choice, 1.0, number=4))
    assert difference(with_lora, plain) > 1e-3
    assert latent(running, sampling(choice, number=5)).equal(plain)  # off again
    let_go(running, forget=False)
    assert latent(running, sampling(choice, number=6)).equal(plain)  # evicted, loaded again
    let_go(running)
    gauge = Gauge(running.pid)
    try:
        gauge.take()
        whole = latent(running, sampling(choice, 0.4, 0.6, number=7))
        large = gauge.take()["VRAM"]
        let_go(running)
        time.sleep(2)  # the queue obeys when it is idle
        gauge.take()
        limited = sampling(choice, 0.4, 0.6, limit=limit, number=8)
        close(running, limited, whole, f"{choice}, streamed")
        small = gauge.take()["VRAM"]
    finally:
        gauge.running = False
    gap = difference(whole, with_lora)
    used = f"{small / 1e9:.2f} of {large / 1e9:.2f} GB"
    warnings.warn(f"{choice}: two LoRAs {gap:.1e}, {used}", stacklevel=1)
    assert gap < ROUNDED
    assert small < large - 2e8  # else nothing was streamed; needs the card to itself


def test_formats_of_one_file_side_by_side(running: Server) -> None:
    single = {c: latent(running, sampling(c, number=1)) for c in ("bnb_nf4", "int8")}
    exact = latent(running, sampling("default", number=1))
    pair = {c: sampling(c, number=10, sampler=c) for c in single}
    result = running.submit(pair["bnb_nf4"] | pair["int8"])
    for choice, alone in single.items():
        assert saved(running, result, choice).equal(alone)
    errors = {choice: difference(alone, exact) for choice, alone in single.items()}
    warnings.warn(f"against bf16: {errors}", stacklevel=1)
    assert 0 < errors["int8"] < errors["bnb_nf4"] < 1


@pytest.mark.parametrize("choice", ["bnb_nf4", "bnb_int8", "int8", "int4"])
def test_what_was_saved_gives_the_same_picture(running: Server, limit: float, choice: str) -> None:
    alone = latent(running, sampling(choice, number=1))
    graph = {
        "unet": loader(choice),
        "save": node("QwenVRAMSaveQuantized", model=["unet", 0], filename_prefix=f"saved_{choice}"),
    }
    result = running.submit(graph)
    assert result.status == "success", result.error
    folder = running.base / "output" / "diffusion_models"
    written = max(folder.glob(f"saved_{choice}*.safetensors"), key=os.path.getmtime)
    let_go(running)
    reopened = sampling("default", number=2, file=written.name)
    assert latent(running, reopened).equal(alone)
    limited = sampling("default", number=3, file=written.name, limit=limit)
    close(running, limited, alone, f"{choice}, read from the file while it computes")
    written.unlink()
