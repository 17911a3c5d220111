"""A real redis-server for tests, on a free port of this machine."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pack.tests.conftest import missing

PASSWORD = "open:sesame/ä"
ENCODED = "open%3Asesame%2F%C3%A4"


class RedisServer:
    """A redis-server on a free port that keeps nothing."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.options = folder, options
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        """Without a password."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, on the same port as before."""
        program = shutil.which("redis-server")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self.folder), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        assert eventually(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close())

    def kill(self) -> None:
        """End it at once, also when it is stopped."""
        self.process.kill()
        self.process.wait(60)

    def client(self, **options: object) -> object:
        """To look into it, and to spoil it."""
        import redis

        return redis.Redis(port=self.port, **options)


def need_redis() -> None:
    """Skip without redis-server or its package; fail in CI."""
    if shutil.which("redis-server") is None:
        missing("redis-server")
    if importlib.util.find_spec("redis") is None:
        missing("the package redis (requirements-test.txt)")


def eventually(check: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether the check comes true, or stops raising, in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if check() is not False:
                return True
        except OSError:
            pass
        time.sleep(0.01)
    return False
