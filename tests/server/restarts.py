"""The shared server, started again: as one start serves all the tests that need another process.

While it starts, its settings file is one that cannot be read, and from then on ComfyUI itself lets
pages of every origin in.
"""

from __future__ import annotations

from pack.core.allocator import MARKER, VARIABLES
from pack.demo.server import Server

EVERY_ORIGIN = "--enable-cors-header"
UNREADABLE = bytes(range(256)) * 50


def start_again(server: Server) -> None:
    """A new process on the same base directory and port, with the same settings afterwards."""
    settings = server.base / "user" / "default" / "comfy.settings.json"
    server.stop()
    if EVERY_ORIGIN not in server.extra_args:
        server.extra_args.append(EVERY_ORIGIN)
    for name in (*VARIABLES, MARKER):
        server.environment.pop(name, None)
    usual = settings.read_bytes()
    settings.write_bytes(UNREADABLE)
    try:
        server.__enter__()
    finally:
        settings.write_bytes(usual)


def started_again(server: Server) -> Server:
    """The same, unless another test has done it."""
    if EVERY_ORIGIN not in server.extra_args:
        start_again(server)
    return server
