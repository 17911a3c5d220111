"""Drives a real ComfyUI server in a process of its own, over loopback only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

HOST = "127.0.0.1"
LINK_NAME = "qwen-vram"
LOG_TAIL_LINES = 30

OnEvent = Callable[[str, dict[str, Any]], None]

# A proxy from the environment must not see loopback requests.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start or stopped answering; the message ends with its log."""


@dataclass(frozen=True)
class Image:
    """One picture that a node put out, as the bytes that /view gives."""

    node_id: str
    kind: str  # output or temp, as ComfyUI calls its folders
    filename: str
    content: bytes


@dataclass
class Result:
    """What the host reported: status is success, error, interrupted or rejected."""

    prompt_id: str
    status: str = ""
    error: str = ""
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: list[Image] = field(default_factory=list)


class _Tracker:
    """Turns the host's events into a Result."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self._running: str | None = None
        self._since = 0.0

    def _start(self, node_id: str | None) -> None:
        now = time.perf_counter()
        seconds = self.result.seconds
        if self._running is not None:
            seconds[self._running] = seconds.get(self._running, 0.0) + now - self._since
        self._running, self._since = node_id, now
        if node_id is None:
            return
        # A node with lazy inputs starts twice, before and after them: its last start is the run.
        if node_id in self.result.executed:
            self.result.executed.remove(node_id)
        self.result.executed.append(node_id)

    def feed(self, event: str, data: dict[str, Any]) -> bool:
        """Takes one event and says whether it was the prompt's last."""
        if data.get("prompt_id") != self.result.prompt_id:
            return False
        if event == "execution_cached":
            self.result.cached = list(data["nodes"])
        elif event == "execution_success":
            self.result.status = "success"
        elif event == "execution_interrupted":
            self.result.status = "interrupted"
        elif event == "execution_error":
            self.result.status = "error"
            self.result.error = f"{data['node_type']}: {data['exception_message']}".strip()
        elif event == "executing":
            self._start(data["node"])
            # The null node comes after the history is written, execution_success before it.
            return data["node"] is None
        return False


def free_port(preferred: int = 0) -> int:
    """The preferred port if nobody listens there, otherwise any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            if os.name == "posix":  # a port that was left a minute ago is free, as for the server
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise ServerError("No free port on 127.0.0.1.")


def link_folder(link: Path, target: Path) -> None:
    """Makes `link` show `target`, by a symlink or, on Windows without the right to, a junction."""
    if link.exists() and link.resolve() == target.resolve():
        return
    if link.is_symlink():
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        command = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
        if os.name != "nt" or subprocess.run(command, capture_output=True).returncode:
            raise ServerError(f"Cannot link {link} to {target}: {error}") from error


def _rejection(body: dict[str, Any]) -> str:
    """The sentence in a refused /prompt, with what each node complains about."""
    error = body.get("error", {})
    parts = [error.get("message", "rejected"), error.get("details", "")]
    for node_id, node in body.get("node_errors", {}).items():
        for item in node.get("errors", []):
            parts.append(f"node {node_id} ({node['class_type']}): {item['message']}")
            parts.append(item.get("details", ""))
    return "; ".join(part for part in parts if part)


class Server:
    """A ComfyUI subprocess with this pack as its only custom node; use it as a context manager."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        pack: Path,
        *,
        cpu: bool,
        extra_args: Sequence[str] = (),
        preferred_port: int = 0,
        start_seconds: float = 180.0,
        log_name: str = "server.log",  # servers that share a base need one each
        environment: Mapping[str, str] | None = None,  # variables beside those of this process
    ) -> None:
        self.comfyui, self.base, self.pack = comfyui, base.absolute(), pack
        self.cpu, self.extra_args = cpu, list(extra_args)
        self.start_seconds = start_seconds
        self.environment = {**os.environ, **(environment or {})}
        self.port = free_port(preferred_port)
        self.log_file = self.base / log_name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of the server, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    # ------------------------------------------------------------------------------- life and death
    def __enter__(self) -> Server:
        """Starts the server and waits until it answers."""
        self._prepare_base()
        # A session of its own, so that Ctrl-C reaches us alone and we stop the server in order.
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the server."""
        self.stop()

    def stop(self) -> None:
        """Ends the process: first asked, after ten seconds killed."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait(self) -> None:
        """Blocks until the server ends by itself."""
        if self._process is not None:
            self._process.wait()

    def _prepare_base(self) -> None:
        for folder in ("models", "input", "output", "temp", "user/default"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link_folder(self.base / "custom_nodes" / LINK_NAME, self.pack)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():
            # Without this the first visit opens a template dialog over the page.
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")

    def _command(self) -> list[str]:
        command = [sys.executable, "-u", str(self.comfyui / "main.py"), "--listen", HOST]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        # The default database lies in ComfyUI's folder and would be shared with other servers.
        command += ["--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch"]
        return command + (["--cpu"] if self.cpu else []) + self.extra_args

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting.\n{self.log_tail()}")
            try:
                self.get_json("/system_stats", timeout=2.0)
                return
            except (OSError, ValueError):
                time.sleep(0.1)
        raise ServerError(
            f"ComfyUI did not answer within {self.start_seconds:.0f} s.\n{self.log_tail()}"
        )

    def log_text(self) -> str:
        """Everything that the server has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    # ------------------------------------------------------------------------------------- requests
    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """The body of a GET request."""
        with _opener.open(self.url + path, timeout=timeout) as response:
            return response.read()

    def get_json(self, path: str, timeout: float = 60.0) -> Any:
        """The decoded JSON body of a GET request."""
        return json.loads(self.get(path, timeout))

    def post_json(self, path: str, body: Any, timeout: float = 60.0) -> Any:
        """The decoded JSON answer to a POST request, None if it has no body."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _opener.open(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text else None

    # -------------------------------------------------------------------------------------- prompts
    def submit(
        self, prompt: dict[str, Any], on_event: OnEvent | None = None, timeout: float = 600.0
    ) -> Result:
        """Runs an API-format prompt to its end and returns what the host reported about it."""
        client_id = uuid.uuid4().hex
        address = f"ws://{HOST}:{self.port}/ws?clientId={client_id}"
        # Connected before the prompt is posted, so that no event is missed.
        events = websocket.create_connection(address, timeout=timeout, http_no_proxy=[HOST])
        try:
            answer = self.post_json("/prompt", {"prompt": prompt, "client_id": client_id})
            result = Result(answer["prompt_id"])
            self._follow(events, result, on_event, timeout)
        except urllib.error.HTTPError as refused:
            if refused.code != 400:
                raise
            return Result("", "rejected", _rejection(json.loads(refused.read())))
        finally:
            events.close()
        history = self.get_json(f"/history/{result.prompt_id}")
        result.outputs = history[result.prompt_id]["outputs"]
        result.images = self._download(result.outputs)
        return result

    def _follow(
        self,
        events: websocket.WebSocket,
        result: Result,
        on_event: OnEvent | None,
        timeout: float,
    ) -> None:
        tracker, deadline = _Tracker(result), time.monotonic() + timeout
        finished = False
        while not finished:
            events.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                message = events.recv()
            except (websocket.WebSocketException, OSError) as error:
                raise ServerError(f"ComfyUI went silent: {error}\n{self.log_tail()}") from error
            if not isinstance(message, str) or not message:
                continue  # binary frames are previews
            event = json.loads(message)
            finished = tracker.feed(event["type"], event["data"])
            if on_event is not None:
                on_event(event["type"], event["data"])

    def _download(self, outputs: dict[str, dict[str, Any]]) -> list[Image]:
        images: list[Image] = []
        for node_id, output in outputs.items():
            for item in output.get("images", []):
                query = urllib.parse.urlencode(
                    {k: item[k] for k in ("filename", "subfolder", "type")}
                )
                content = self.get(f"/view?{query}")
                images.append(Image(node_id, item["type"], item["filename"], content))
        return images
