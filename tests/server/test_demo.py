"""The demo as a user runs it: two ComfyUI processes, the second one without the text encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.demo.environment import inside_venv
from pack.demo.substitutions import MODEL_FILES, UnknownModelFile, substitute
from pack.tests.conftest import ROOT


def test_make_demo_reuses_the_prompt_in_a_new_process(comfyui: Path) -> None:
    if not inside_venv():
        pytest.skip("the demo runs inside .venv, where `make test` runs the tests")
    command = [sys.executable, "-m", "demo", "--prompt", "一只戴帽子的小熊 🐻"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "events of run 1: the text encoder's loader was executed",
        "events of run 2: the text encoder's loader was not executed",
        "The two pictures are identical, pixel by pixel.",
        "miss: new text",
        "hit (disk)",
    ):
        assert line in done.stdout, done.stdout
    assert (ROOT / ".demo" / "output" / "demo_2.png").is_file()


def test_the_demo_says_in_one_sentence_what_it_lacks() -> None:
    command = [sys.executable, "-m", "demo"]
    env = {**os.environ, "COMFYUI_PATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Set-up failed: COMFYUI_PATH")


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_every_bundled_workflow_runs_as_shipped(server, path: Path) -> None:
    from pack.demo.conversion import load_workflow

    graph = substitute(load_workflow(path, server.get_json("/object_info")))
    result = server.submit(graph)
    assert result.status == "success", result.error
    assert result.images


def test_a_model_file_that_the_table_does_not_know_stops_the_substitution() -> None:
    (official, tiny), *_ = MODEL_FILES.items()
    prompt = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": official}}}
    assert tiny in json.dumps(substitute(prompt))
    prompt["1"]["inputs"]["unet_name"] = "another.safetensors"
    with pytest.raises(UnknownModelFile, match=r"another\.safetensors"):
        substitute(prompt)
