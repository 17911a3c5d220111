"""One test host for all rooms: the pack as `pack`, ComfyUI in process, on a server, in a browser."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pack.demo.server import Server
    from pack.tests.host import Host

ROOT = Path(__file__).resolve().parents[1]
# The rooms of the tests that share the fixture `host`, and of those that share `server`: two, each
# with its own, since a browser's tests mostly wait.
SHARED = {"nodes": "host", "demo": "host", "browser": "browser", "server": "server"}
SERVERS_OF_THEIR_OWN = ("test_make_demo.py",)

# The in-process host takes half of all the time, so its modules are dealt out in parts, by the
# first letters of their names: to one worker, which then starts ComfyUI once, or to more. Those
# from "reference" on wait for a process that the ones before them have begun: they stay together.
PARTS_OF_THE_HOST = ("", "e", "o", "q", "report", "t")


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
from pack.tests import examples as _profiles  # noqa: E402, F401


def group_of(nodeid: str) -> str:
    """What runs in one worker: tests that share ComfyUI in process, or the server; or a module.

    So the server starts once, the host once for each worker at most, and the rest goes to the
    worker that is free.
    """
    module = nodeid.partition("::")[0]
    _, room, *_, file = module.split("/")
    if module.endswith(SERVERS_OF_THEIR_OWN):
        return module
    group = {**SHARED, "gpu": "gpu"}.get(room, module)
    if group != "host" or room == "demo":
        return group
    name = file.removeprefix("test_")
    return f"host {sum(name >= first for first in PARTS_OF_THE_HOST)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that the workers end together."""
    parts = [f"host {number + 1}" for number in range(len(PARTS_OF_THE_HOST))]
    longest = [parts[0], "browser", "server", *parts[1:], "host", *SERVERS_OF_THEIR_OWN]

    def rank(item: pytest.Item) -> int:
        group = group_of(item.nodeid)
        return next((i for i, end in enumerate(longest) if group.endswith(end)), len(longest))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What was collected lives until the end: Python need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give tests to workers by groups.

    The plugin's own `--dist loadgroup` does nothing with pytest 9.2, which stores ids elsewhere.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


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


@pytest.fixture(scope="session")
def fresh_pictures(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a process that has run nothing else makes of reference_cases.py. It takes a while:
    tests that come before those that need it ask for it, so that nobody waits."""
    from pack.tests.nodes.reference_cases import fresh_process

    with fresh_process(comfyui, tmp_path_factory.mktemp("fresh"), ROOT) as read:
        yield read


@pytest.fixture
def fresh(host: Host) -> Host:
    """The in-process host with all caches empty: ComfyUI's, the store's, the registry's."""
    host.forget_everything()
    return host


@pytest.fixture(scope="session")
def models(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder for servers: made once for all workers, to be copied."""
    from filelock import FileLock  # torch brings it
    from pack.demo.checkpoints import make_checkpoints
    from pack.tests.official import write_narrow_vae, write_stock_text_encoder

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            half = folder.with_name("half checkpoints")  # what fails midway counts for nothing
            make_checkpoints(comfyui, half)
            write_stock_text_encoder(half)
            write_narrow_vae(half)
            half.rename(folder)
    return folder


@pytest.fixture(scope="session")
def make_base(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a base directory with tiny checkpoints, known to the stock loaders, and a picture."""
    from pack.demo.animals import draw
    from pack.demo.serving import SCENE

    def make(name: str) -> Path:
        base = tmp_path_factory.mktemp(name)
        (base / "input").mkdir()
        # Under the name of the one that ComfyUI ships, which the edit workflows start with.
        draw(SCENE, 256, 256).save(base / "input" / "example.png")
        shutil.copytree(ROOT / "tests" / "teach_stock", base / "custom_nodes" / "teach_stock")
        shutil.copytree(models, base / "models")
        return base

    return make


@pytest.fixture(scope="session")
def server(comfyui: Path, make_base: Callable[[str], Path]) -> Iterator[Server]:
    """One real ComfyUI server with the pack and tiny checkpoints, shared by all tests."""
    from pack.demo.server import Server

    options = {"cpu": True, "extra_args": ["--use-pytorch-cross-attention"]}
    options["start_seconds"] = 600.0  # a machine may be busy
    with Server(comfyui, make_base("server"), ROOT, **options) as running:
        yield running
