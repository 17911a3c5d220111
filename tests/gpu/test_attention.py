"""On a card: the backends that pass their self-test are right, broken ones fail it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.benchmarks import full_size_checkpoints as files
from pack.demo.server import Result, Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import node
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDTH, HEADS, SIDE, LAYERS = 128, 24, 512, 4
TOLERANCE = 6e-2  # of latents after three steps with random weights, which another kernel moves
Graph = dict[str, Any]


@pytest.fixture(scope="module")
def attention(comfyui: Path) -> SimpleNamespace:
    """The modules behind the node, in this process."""
    sys.path.insert(0, str(comfyui))
    from pack.core import attention as arithmetic
    from pack.nodes import attention_backends, attention_health

    return SimpleNamespace(
        backends=attention_backends, health=attention_health, arithmetic=arithmetic
    )


def situation(attention: SimpleNamespace, mask: str) -> Any:
    """Qwen-Image's on this card."""
    return attention.health.Situation(torch.device("cuda", 0), torch.bfloat16, WIDTH, mask)


def random(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half precision, as the model's."""
    draw = torch.Generator("cuda").manual_seed(3)
    shapes = [(1, HEADS, n, WIDTH) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(s, generator=draw, device="cuda").bfloat16() for s in shapes)
    return q, k, v


@pytest.mark.parametrize("masked", [False, True])
def test_healthy_backends_are_right_with_more_keys_than_queries(
    attention: SimpleNamespace, masked: bool
) -> None:
    arithmetic, found = attention.arithmetic, {}
    q, k, v = random(1500, 2301)  # as a pass that reuses its references; no round numbers
    mask = torch.zeros(1, 1, 1, k.shape[2], device="cuda", dtype=q.dtype)
    mask[..., 700:800] = torch.finfo(q.dtype).min
    where = situation(attention, arithmetic.HIDDEN_KEYS if masked else arithmetic.NO_MASK)
    bias = mask.float().expand(1, HEADS, q.shape[2], -1) if masked else None
    wanted = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    for name, backend in attention.backends.BACKENDS.items():
        verdict = attention.health.verdict(backend, where)
        if not verdict.healthy:
            found[name] = verdict.reason
            continue
        attend = arithmetic.mask_aware(backend.attend, backend.takes_masks)
        result = attend(q, k, v, mask if masked else None, None)
        error = float((result.float() - wanted).norm() / wanted.norm())
        found[name] = f"{error:.1e}"
        assert error < arithmetic.tolerance(q.dtype, q.device, backend.quantised), name
    warnings.warn(str(found), stacklevel=1)
    for name in ("PyTorch SDPA", "SDPA flash", "SDPA efficient", "SDPA cuDNN"):
        assert found[name][0].isdigit(), found


def nan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Black pictures."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) * torch.nan


def maskless(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Takes a mask and forgets it."""
    return scaled_dot_product_attention(q, k, v, scale=scale)


def unscaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Another scale than the one that is asked for."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)


@pytest.mark.parametrize("broken", [nan, maskless, unscaled])
def test_a_broken_backend_fails_on_this_card(
    attention: SimpleNamespace, broken: Callable[..., Tensor]
) -> None:
    backend = attention.backends.Backend(broken.__name__, broken, lambda device: "", True)
    kind = attention.arithmetic.BIAS if broken is maskless else attention.arithmetic.NO_MASK
    verdict = attention.health.verdict(backend, situation(attention, kind))
    assert not verdict.healthy and verdict.reason, verdict


# ---------------------------------------------------------------------------------- on a server
@pytest.fixture(scope="module")
def running(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a short transformer of full width."""
    base = tmp_path_factory.mktemp("attention")
    target = base / "custom_nodes" / "tiled_edit_nodes"
    shutil.copytree(ROOT / "benchmarks" / "tiled_edit_nodes", target)
    code = "import sys, os; sys.path[:0] = [os.getcwd(), sys.argv[1]]; target = sys.argv[2]\n"
    code += "del sys.argv[1:]\nfrom pathlib import Path\n"
    code += "from benchmarks.full_size_checkpoints import write_all\n"
    code += f"write_all(Path(target), {LAYERS})"
    command = [sys.executable, "-c", code, str(comfyui), str(base / "models")]
    subprocess.run(command, cwd=ROOT, check=True)
    (base / "web").mkdir()
    (base / "web" / "index.html").touch()
    extra = ["--front-end-root", str(base / "web")]
    with Server(comfyui, base, ROOT, cpu=False, extra_args=extra) as server:
        assert server.submit(sampling(1)).status == "success"
        yield server


def sampling(number: int, backend: str | None = None, cached: bool = False) -> Graph:
    """Three steps with a reference; attention as stock or by a backend of ours."""
    texts = {"width": 3584, "references": f"{SIDE}x{SIDE}"}
    graph = {
        "unet": node(
            "UNETLoader", unet_name=files.TRANSFORMER.split("/")[1], weight_dtype="default"
        ),
        "text": node("BenchConditions", tokens=73, **texts),
        "other": node("BenchConditions", tokens=41, **texts),
        "latent": node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    model = "unet"
    if backend:
        graph["attention"] = node("QwenVRAMAttention", model=[model, 0], backend=backend)
        graph["text_of_it"] = node("PreviewAny", source=["attention", 1])
        model = "attention"
    if cached:
        inputs = {
            **{"refresh": "every n steps", "refresh_every": 10, "drift_threshold": 0.1},
            **{"full_last_steps": 0, "store_format": "model", "store_place": "gpu"},
            **{"causal": False, "region": False, "region_margin": 64, "region_threshold": 0.05},
        }
        graph["cache"] = node("QwenVRAMReferenceCache", model=[model, 0], **inputs)
        model = "cache"
    graph["measure"] = node("BenchMeasure", model=[model, 0], number=number)
    graph["sampler"] = node(
        "KSampler",
        **{"model": ["measure", 0], "positive": ["text", 0], "negative": ["other", 0]},
        **{"latent_image": ["latent", 0], "seed": 7, "steps": 3, "cfg": 2.0, "denoise": 1.0},
        **{"sampler_name": "euler", "scheduler": "simple"},
    )
    graph["saved"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/attend")
    return graph


def latent(server: Server, result: Result) -> Tensor:
    """What was saved."""
    from safetensors.torch import load_file

    assert result.status == "success", result.error
    (saved,) = result.outputs["saved"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    return load_file(path)["latent_tensor"]


def test_pytorchs_own_changes_no_bit(running: Server) -> None:
    stock = latent(running, running.submit(sampling(2)))
    assert latent(running, running.submit(sampling(3, "PyTorch SDPA"))).equal(stock)
    assert latent(running, running.submit(sampling(4, "ComfyUI's own"))).equal(stock)


@pytest.mark.parametrize("cached", [False, True])
def test_auto_and_each_kernel_give_the_same_picture(running: Server, cached: bool) -> None:
    stock = latent(running, running.submit(sampling(5, None, cached)))
    for number, name in enumerate(("auto", "SDPA cuDNN", "SDPA efficient", "SDPA flash"), 6):
        made = latent(running, running.submit(sampling(number + 10 * cached, name, cached)))
        error = float((made - stock).norm() / stock.norm())
        warnings.warn(f"{name}{', cache' * cached}: {error:.1e}", stacklevel=1)
        assert torch.isfinite(made).all() and error < TOLERANCE, name
