"""One test host for all rooms: the pack as `pack`, ComfyUI in process, on a server, in a browser."""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pack.demo.server import Server
    from pack.tests.host import Host

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes tells of the machine; the first one reads the sources of ComfyUI.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")


def _register_pack() -> None:
    """Stand in for the root package, so that pytest never runs ComfyUI's entry point (6.4 trap).

    A test then writes `from pack.core import tiling`, whatever the checkout's folder is called.
    """
    own = "pack" if ROOT.name in sys.stdlib_module_names else ROOT.name  # a clone called "copy"
    for name in ("pack", "__init__", own):
        module = types.ModuleType(name)
        module.__file__ = str(ROOT / "__init__.py")
        module.__path__ = [str(ROOT)]
        sys.modules[name] = module


_register_pack()

from pack.demo import environment  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Describe the one marker."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def missing(what: str) -> None:
    """Fail in CI, skip with one loud line elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have {what}.")
    pytest.skip(f"*** SKIPPED: {what} not found ***")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout that all host tests use."""
    found = environment.find_comfyui()
    if found is None:
        missing("ComfyUI (set COMFYUI_PATH, or run `make test` once)")
    return found


@pytest.fixture(scope="session")
def host(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """ComfyUI inside this process, with the pack and tiny random checkpoints."""
    from pack.tests.host import Host

    yield Host(comfyui, tmp_path_factory.mktemp("base"), ROOT)


@pytest.fixture
def fresh(host: Host) -> Host:
    """The in-process host with all caches empty: ComfyUI's, the store's, the registry's."""
    host.forget_everything()
    return host


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real ComfyUI server with the pack and tiny checkpoints, shared by all tests."""
    from pack.demo.checkpoints import make_checkpoints
    from pack.demo.server import Server

    base = tmp_path_factory.mktemp("server")
    shutil.copytree(ROOT / "tests" / "teach_stock", base / "custom_nodes" / "teach_stock")
    make_checkpoints(comfyui, base / "models")
    with Server(
        comfyui, base, ROOT, cpu=True, extra_args=["--use-pytorch-cross-attention"]
    ) as running:
        yield running
