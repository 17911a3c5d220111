"""On a card: what the node writes, before and after drawing, is what the command line writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pack.demo.checkpoints import make_checkpoints
from pack.demo.embedded import TRANSFORMER
from pack.demo.server import Server
from pack.tests.conftest import ROOT
from pack.tests.graphs import embedded_text_to_image, node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMATS = {"bnb_nf4": "bnb_nf4", "int8": "int8", "int4": "w4a8"}


@pytest.mark.parametrize("flags", [(), ("--disable-dynamic-vram",)], ids=["dynamic", "not dynamic"])
def test_the_node_and_the_command_write_the_same_file(
    comfyui: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    make_checkpoints(comfyui, tmp_path / "models")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.html").touch()
    extra = ["--front-end-root", str(tmp_path / "web"), *flags]
    folder = tmp_path / "output" / "diffusion_models"
    with Server(comfyui, tmp_path, ROOT, cpu=False, extra_args=extra) as server:
        for choice in FORMATS:
            graph = embedded_text_to_image("a red bunny", width=128, height=128)
            graph["unet"]["inputs"]["weight_dtype"] = choice
            # The second is written while the model is where drawing left it.
            for number in (1, 2):
                graph["write"] = node(
                    "QwenVRAMSaveQuantized", model=["unet", 0], filename_prefix=f"{choice}_{number}"
                )
                result = server.submit(graph)
                assert result.status == "success", (choice, result.error)
    for choice, format in FORMATS.items():
        target = tmp_path / f"{choice}.safetensors"
        given = [str(tmp_path / "models" / TRANSFORMER), str(target), "--format", format]
        command = [sys.executable, "-m", "core.quantize_file", *given, "--device", "cuda"]
        subprocess.run(command, cwd=ROOT, check=True)
        for number in (1, 2):
            (written,) = folder.glob(f"{choice}_{number}_*.safetensors")
            assert written.read_bytes() == target.read_bytes(), (choice, number)
