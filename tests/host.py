"""The real ComfyUI inside the test process: its executor, its nodes, its caches; no HTTP."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
import types
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RunError(Exception):
    """A graph that ComfyUI refused or that failed; `details` is ComfyUI's own account."""

    def __init__(self, message: str, details: Any) -> None:
        super().__init__(message)
        self.details = details


@dataclass
class Run:
    """What one prompt did, by the host's own events."""

    outputs: dict[str, Any]
    ui: dict[str, Any]
    executed: list[str]
    cached: list[str]

    def status(self, node_id: str) -> dict[str, Any]:
        """What one of our nodes showed about itself."""
        return self.ui[node_id]["qwen_vram"][0]


class _MadeOnce:
    """A class that gives the same object for the same arguments.

    An object, no function: the pack looks for functions that are not ComfyUI's.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.made: dict[str, Any] = {}

    def __call__(self, **options: Any) -> Any:
        key = repr(options)
        if key not in self.made:
            self.made[key] = self.kind(**options)
        return self.made[key]


class Host:
    """Start it once per process: ComfyUI's modules are global."""

    def __init__(self, comfyui: Path, base: Path, pack: Path) -> None:
        self.base, self.pack_root = base, pack
        self.models = base / "models"
        sys.path.insert(0, str(comfyui))  # before the pack, whose folder is called nodes too
        self._configure(base)
        import execution
        import folder_paths
        import nodes
        import server
        import torch

        self.execution, self.nodes, self.folder_paths = execution, nodes, folder_paths
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.server = server.PromptServer(self.loop)
        self.server.client_id = "pytest"
        self.events: list[tuple[str, Any]] = []
        self.server.send_sync = lambda event, data, sid=None: self.events.append((event, data))
        self._write_checkpoints()
        self._read_the_vocabulary_once()
        self.loop.run_until_complete(
            nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        )
        self._add_test_nodes()  # before the pack: what changes later is not trusted
        assert self.loop.run_until_complete(
            nodes.load_custom_node(str(pack), module_parent="custom_nodes")
        )
        self.pack = self._module(pack)
        # PreviewAny writes tensors out: six numbers of each row took a twentieth of all time.
        torch.set_printoptions(edgeitems=2, threshold=16)
        gc.collect()
        gc.freeze()  # what lives now lives on: collecting takes a quarter of a second otherwise
        # Nothing was left that lives long, so Python would look at everything every 70,000 objects.
        gc.set_threshold(20_000, 10, 20)
        self.restart()

    @staticmethod
    def _configure(base: Path) -> None:
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = True
        args.use_pytorch_cross_attention = True
        args.base_directory = str(base)
        args.database_url = "sqlite:///:memory:"
        args.preview_method = type(args.preview_method)("none")

    @staticmethod
    def _read_the_vocabulary_once() -> None:
        """Let all text encoders share a tokenizer: to read it was half the time of all tests, and
        to turn its vocabulary round an eighth of what the loaders took."""
        from comfy.text_encoders import qwen_image

        qwen_image.Qwen25_7BVLITokenizer = _MadeOnce(qwen_image.Qwen25_7BVLITokenizer)

    def _write_checkpoints(self) -> None:
        from pack.demo import checkpoints, tiny_checkpoints

        tiny_checkpoints.write_all(self.models)
        checkpoints.place_embedded(self.models)
        (self.base / "input").mkdir(exist_ok=True)

    def _add_test_nodes(self) -> None:
        """Install tests/extension as another custom node, in the folder where such things lie."""
        target = self.base / "custom_nodes" / "test_extension"
        shutil.copytree(Path(__file__).parent / "extension", target)
        loading = self.nodes.load_custom_node(str(target), module_parent="custom_nodes")
        assert self.loop.run_until_complete(loading)

    @staticmethod
    def _module(pack: Path) -> types.ModuleType:
        """The pack as ComfyUI imported it: not the copy that `import pack` gives."""
        name = str(pack).replace(".", "_x_")
        return sys.modules[name]

    def part(self, name: str) -> types.ModuleType:
        """A module of the loaded pack, as "nodes.loaders"."""
        return sys.modules[f"{self.pack.__name__}.{name}"]

    def restart(self, cache: str = "CLASSIC") -> None:
        """A new executor with empty caches, as after a restart of the process."""
        kind = self.execution.CacheType[cache]
        sizes = {"lru": 10, "ram": 0, "ram_inactive": 0}
        self.executor = self.execution.PromptExecutor(
            self.server, cache_type=kind, cache_args=sizes
        )
        self.store.forget_memory()
        gc.collect()

    def forget_everything(self) -> None:
        """As after a restart on an empty disk."""
        self.part("nodes.loaders").REGISTRY.release()
        self.restart()
        shutil.rmtree(self.store_directory, ignore_errors=True)

    @property
    def store_directory(self) -> Path:
        """Where the conditioning store keeps its files, all of them written."""
        assert self.store.flush()
        return self.store.directory

    @property
    def store(self) -> Any:
        """The conditioning store of the loaded pack."""
        return self.part("nodes.store").STORE

    def run(self, graph: dict[str, Any], targets: list[str] | None = None) -> Run:
        """Validate and execute an API-format graph, as far as `targets` need. Raises RunError."""
        prompt_id = uuid.uuid4().hex
        graph = {k: {**v, "inputs": dict(v["inputs"])} for k, v in graph.items()}
        ok, error, outputs, details = self.loop.run_until_complete(
            self.execution.validate_prompt(prompt_id, graph, None)
        )
        if not ok:
            raise RunError(str(error), details)
        self.events.clear()
        wanted = outputs if targets is None else targets
        self.executor.execute(graph, prompt_id, {"client_id": "pytest"}, wanted)
        if not self.executor.success:
            failure = self.executor.status_messages[-1][1]
            raise RunError(failure.get("exception_message", ""), failure)
        return self._result()

    def _result(self) -> Run:
        executed = [d["node"] for e, d in self.events if e == "executing" and d["node"]]
        cached = next((d["nodes"] for e, d in self.events if e == "execution_cached"), [])
        ui = self.executor.history_result["outputs"]
        outputs = {n: self.executor.caches.outputs.get_local(n) for n in executed}
        return Run(
            {n: entry.outputs for n, entry in outputs.items() if entry is not None},
            ui,
            list(dict.fromkeys(executed)),
            list(cached),
        )
