"""Entries in Redis, for several machines that share prompts.

A prompt never waits for Redis longer than ANSWER_SECONDS, and for one that is away only once: the
connection is made and made again in the background, and until it stands nothing is asked. Entries
are sent in the background too.

Each entry expires by itself. The bound on all of them is kept by the senders: a sorted set holds
when each entry was last used (by Redis' own clock) and a hash how large it is, and a sender that
has sent a share of the bound adds up the sizes and deletes what was used least recently. There is
no counter that could drift: sizes of entries that expired, or that Redis itself evicted, are
dropped before they are added up, and two senders who tidy at once delete the same entries.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .background import Deadline, Worker
from .statistics import Size

log = logging.getLogger("qwen_vram")

PREFIX = "{qwen_vram}:"  # braces: one slot of a cluster, so that several keys change at once
ENTRY = PREFIX + "entry:"
USED = PREFIX + "used"
SIZES = PREFIX + "sizes"
ANSWER_SECONDS = 0.1
CONNECT_SECONDS = 2.0
WRITE_SECONDS = 5.0
CLEAR_SECONDS = 10.0
USAGE_SECONDS = 1.0
RETRY_SECONDS = 5.0
QUEUE_BYTES = 64 << 20
RESERVED_SHARE = 8
BLIND_SHARE = 64
BATCH = 500
REMEDY = "write redis://[[user]:password@]host[:port][/database], or rediss:// for TLS"


class RedisTier:
    """Bytes by key in the Redis at `url`, each for `ttl_seconds` after its last use.

    All entries together take at most about `max_bytes`. Raises ValueError for an URL that is none
    and ImportError without the package redis; never for a server that is away.
    `state` is "connecting", "connected", "unreachable", "refused" or "closed", `reason` says why.
    """

    def __init__(self, url: str, ttl_seconds: int, max_bytes: int) -> None:
        if ttl_seconds < 1:
            raise ValueError("Entries in Redis must live for at least a second; set more days.")
        self.ttl_seconds = ttl_seconds
        self.max_bytes = max_bytes
        self.state, self.reason = "connecting", ""
        self._redis = _package()
        self._options = self._parse(url)
        as_written = re.findall(r"://[^:/@]*:([^@/]*)@", url)
        self._secrets = {*as_written, self._options.get("password", "")} - {""}
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._closed = threading.Event()
        self._connector: threading.Thread | None = None
        self._reader: Any = None
        self._waited = False
        self._worker = Worker("qwen_vram redis", QUEUE_BYTES)
        self._blind_bytes: int | None = None
        self._warned: set[str] = set()
        self._errors = (self._redis.exceptions.RedisError, OSError)
        self._client = self._make_client()
        self._connect_in_background()

    def fetch(self, key: str) -> bytes | None:
        """The bytes under `key`, or None; they are not verified.

        To learn that Redis is away costs ANSWER_SECONDS at most; while it is, this costs nothing.
        """
        deadline = Deadline(ANSWER_SECONDS)
        if not self._asking.acquire(timeout=ANSWER_SECONDS):
            return None
        try:
            for _ in range(2):  # again after a connection that only had been closed for idleness
                if (reader := self._ready(deadline)) is None:
                    return None
                try:
                    return self._ask(reader, key)
                except self._redis.exceptions.ResponseError as error:
                    self._refused(key, error)
                    return None
                except self._errors as error:
                    self._lost(reader, error)
        finally:
            self._asking.release()
        return None

    def send(self, key: str, data: bytes) -> None:
        """Store bytes under `key` in the background; not what is larger than the bound."""
        self._submit(lambda: self._send(key, data), data)

    def touch(self, key: str, data: bytes) -> None:
        """Note in the background that `key` was used; send it if Redis lacks it."""
        self._submit(lambda: self._touch(key, data), data)

    def discard(self, key: str) -> None:
        """Delete what is stored under `key`, in the background."""
        self._submit(lambda: self._remove([key]), b"")

    def flush(self, timeout: float) -> bool:
        """Wait until what was sent has been stored or given up; False after `timeout` seconds."""
        return self._worker.flush(timeout)

    def clear(self, unused_seconds: float = 0.0) -> Size | None:
        """Delete our entries not used for so long, or all; None if Redis does not answer."""
        return self._in_background(lambda: self._clear(unused_seconds), CLEAR_SECONDS)

    def usage(self) -> Size | None:
        """Our entries in Redis; None if it does not answer soon."""
        return self._in_background(lambda: _size(self._alive().values()), USAGE_SECONDS)

    def close(self) -> None:
        """Send what waits, within a bound of time, and leave."""
        self._worker.flush(WRITE_SECONDS if self.state == "connected" else 0.0)
        self._closed.set()
        self._set("closed", "")
        with self._changed:
            reader, self._reader = self._reader, None
        if reader:
            reader.disconnect()
        self._client.close()

    @property
    def where(self) -> str:
        """The server in words, without its password."""
        if "path" in self._options:
            return f"Redis at {self._options['path']}"
        host, port = self._options.get("host", "localhost"), self._options.get("port", 6379)
        return f"Redis at {host}:{port}"

    def _parse(self, url: str) -> dict[str, Any]:
        try:
            options = self._redis.connection.parse_url(url)
        except ValueError:  # its message may hold the password
            raise ValueError(f"The Redis URL in the settings is not one; {REMEDY}.") from None
        known = {"connection_class", "host", "port", "path", "db", "username", "password"}
        strange = [name for name in options if name not in known]
        # a database that is no number would be taken for database 0 without a word
        right = re.match(r"(?i)unix://|rediss?://[^/?]*(/\d*)?(\?|$)", url)
        if strange or not right or not {"host", "path"} & options.keys():
            raise ValueError(f"The Redis URL in the settings is not complete; {REMEDY}.")
        return options

    def _connection_options(self, timeout: float) -> dict[str, Any]:
        retry = self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0)
        times = {"socket_timeout": timeout, "socket_connect_timeout": CONNECT_SECONDS}
        return {**self._options, **times, "retry": retry, "protocol": 2}

    def _make_client(self) -> Any:
        """For the background: it may take its time."""
        pool = self._redis.ConnectionPool(**self._connection_options(WRITE_SECONDS))
        return self._redis.Redis(connection_pool=pool)

    def _connect_in_background(self, after: float = 0.0) -> None:
        with self._changed:
            if self._connector or self._closed.is_set():
                return
            self._connector = threading.Thread(target=self._connect, args=(after,), daemon=True)
        try:
            self._connector.start()
        except RuntimeError as error:  # no more threads, or the interpreter is ending
            self._connector = None
            self._set("unreachable", str(error))

    def _connect(self, pause: float) -> None:
        while not self._closed.wait(pause):
            pause = RETRY_SECONDS
            try:
                reader = self._open()
            except (*self._errors, ValueError) as error:  # a host name that cannot be one
                self._report(error)
            else:
                self._connected(reader)
                return

    def _open(self) -> Any:
        """A connection of our own: a pool would connect again in the middle of a prompt."""
        options = self._connection_options(ANSWER_SECONDS)
        kind = options.pop("connection_class", self._redis.Connection)
        reader = kind(**options)
        reader.connect()
        reader.send_command("PING")
        reader.read_response()
        return reader

    def _connected(self, reader: Any) -> None:
        again = self.state != "connecting"
        with self._changed:
            self._reader, self._connector, self._waited = reader, None, False
            self._warned.clear()
        self._set("connected", "")
        if again:
            log.info("%s is connected; prompts are shared.", self.where)

    def _report(self, error: Exception) -> None:
        """Say why there is no connection: once an outage for each kind of reason."""
        errors = self._redis.exceptions
        refusals = (errors.AuthenticationError, errors.NoPermissionError)
        if isinstance(error, refusals) or str(error).startswith(("NOAUTH", "WRONGPASS")):
            reason = "it refuses the user or password"
            advice = "Correct them in the Redis URL of the settings"
            self._set("refused", reason)
        else:
            reason = f"it cannot be reached ({self._words(error)})"
            advice = "It is tried again in the background"
            self._set("unreachable", reason)
        self._warn(self.state, f"Prompts are not shared by {self.where}: {reason}. {advice}.")

    def _ready(self, deadline: Deadline) -> Any:
        """The connection for asking, or None; waits for one that is being made, but only once."""
        with self._changed:
            if self.state == "connecting" and not self._waited:
                self._waited = True
                self._changed.wait_for(lambda: self.state != "connecting", deadline.left())
            return self._reader if self.state == "connected" else None

    def _ask(self, reader: Any, key: str) -> bytes | None:
        reader.send_command("STRLEN", ENTRY + key)  # answered at once, however large the entry is
        size = reader.read_response()
        if not size or size > self.max_bytes:
            return None
        reader.send_command("GET", ENTRY + key)
        return reader.read_response()

    def _refused(self, key: str, error: Exception) -> None:
        if "WRONGTYPE" in str(error):  # not what we wrote under that name
            self.discard(key)
        self._warn("ask", f"{self.where} does not give prompts: {self._words(error)}.")

    def _lost(self, reader: Any, error: Exception) -> None:
        """After an error the connection is not used again; another is made in the background."""
        slow = isinstance(error, self._redis.exceptions.TimeoutError)
        with self._changed:
            self._reader = None
        self._set("connecting", "")
        if slow:
            self._report(error)
        reader.disconnect()
        self._connect_in_background(after=RETRY_SECONDS if slow else 0.0)

    def _submit(self, job: Callable[[], Any], data: bytes) -> None:
        if len(data) > self.max_bytes or self.state not in ("connected", "connecting"):
            return
        if not self._worker.submit(lambda: self._try(job), len(data)):
            self._warn("slow", f"{self.where} is too slow: some prompts are not shared.")

    def _try(self, job: Callable[[], Any]) -> Any:
        """In the background: do something with Redis; None if that is not possible."""
        with self._changed:  # nobody waits for this thread
            self._changed.wait_for(lambda: self.state != "connecting", CONNECT_SECONDS)
        if self.state != "connected":
            return None
        try:
            return job()
        except self._errors as error:
            self._warn("do", f"{self.where} does not take prompts: {self._words(error)}.")
            return None

    def _in_background(self, job: Callable[[], Size], seconds: float) -> Size | None:
        """The result of a job that may take so long; None if it fails or takes longer."""
        results: queue.SimpleQueue[Size | None] = queue.SimpleQueue()
        if self.state != "connected" or not self._worker.submit(
            lambda: results.put(self._try(job))
        ):
            return None
        try:
            return results.get(timeout=seconds)
        except queue.Empty:
            return None

    def _clear(self, unused_seconds: float) -> Size:
        alive = self._alive()
        doomed = list(alive)
        if unused_seconds > 0:
            uses, latest = self._last_uses(), self._now() - unused_seconds
            doomed = [key for key in alive if uses.get(key, 0.0) <= latest]
        self._remove(doomed)
        if unused_seconds <= 0:  # also what no list names any more
            for batch in _batches(list(self._client.scan_iter(PREFIX + "*", count=BATCH))):
                self._client.unlink(*batch)
        return _size(alive[key] for key in doomed)

    def _send(self, key: str, data: bytes) -> None:
        now = self._now()
        with self._client.pipeline(transaction=True) as pipe:
            pipe.set(ENTRY + key, data, ex=self.ttl_seconds)
            pipe.zadd(USED, {key: now})
            pipe.hset(SIZES, key, len(data))
            pipe.execute()
        known = self._blind_bytes
        if known is None or known + len(data) > self.max_bytes // BLIND_SHARE:
            self._trim()
            self._blind_bytes = 0
        else:
            self._blind_bytes = known + len(data)

    def _touch(self, key: str, data: bytes) -> None:
        if not self._client.expire(ENTRY + key, self.ttl_seconds):
            return self._send(key, data)
        self._client.zadd(USED, {key: self._now()})
        self._client.hset(SIZES, key, len(data))

    def _trim(self) -> None:
        alive = self._alive()
        total = sum(alive.values())
        if total <= self.max_bytes:
            return
        uses = self._last_uses()
        doomed = []
        for key in sorted(alive, key=lambda key: uses.get(key, 0.0)):
            if total <= self.max_bytes - self.max_bytes // RESERVED_SHARE:
                break
            doomed.append(key)
            total -= alive[key]
        self._remove(doomed)

    def _alive(self) -> dict[str, int]:
        """Sizes of the entries that are there; those that expired or were evicted are dropped."""
        sizes = {key.decode(): int(size) for key, size in self._client.hgetall(SIZES).items()}
        gone: set[str] = set()
        for batch in _batches(list(sizes)):
            with self._client.pipeline(transaction=False) as pipe:
                for key in batch:
                    pipe.exists(ENTRY + key)
                there = pipe.execute()
            gone |= {key for key, count in zip(batch, there, strict=True) if not count}
        self._remove(list(gone))
        return {key: size for key, size in sizes.items() if key not in gone}

    def _last_uses(self) -> dict[str, float]:
        pairs = self._client.zrange(USED, 0, -1, withscores=True)
        return {key.decode(): used for key, used in pairs}

    def _remove(self, keys: list[str]) -> None:
        for batch in _batches(keys):
            with self._client.pipeline(transaction=True) as pipe:
                pipe.unlink(*(ENTRY + key for key in batch))
                pipe.zrem(USED, *batch)
                pipe.hdel(SIZES, *batch)
                pipe.execute()

    def _now(self) -> float:
        """Redis' clock, which all machines share."""
        seconds, microseconds = self._client.time()
        return seconds + microseconds / 1e6

    def _set(self, state: str, reason: str) -> None:
        with self._changed:
            self.state, self.reason = ("closed", "") if self._closed.is_set() else (state, reason)
            self._changed.notify_all()

    def _words(self, error: Exception) -> str:
        """An error without the password, should a library ever put it there."""
        words = str(error).rstrip(".") or type(error).__name__
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return re.sub(r"://[^@/\s]*@", "://***@", words)

    def _warn(self, what: str, message: str) -> None:
        with self._changed:
            known = what in self._warned
            self._warned.add(what)
        if not known:
            log.warning(message)


def _package() -> Any:
    """The optional package. Raises ImportError with the remedy."""
    try:
        import redis
        import redis.backoff
        import redis.connection
        import redis.retry
    except ImportError as error:
        raise ImportError(
            "The Python package redis is missing; install it for ComfyUI's Python "
            "(pip install redis), or remove the Redis URL from the settings."
        ) from error
    return redis


def _size(sizes: Iterable[int]) -> Size:
    sizes = list(sizes)
    return Size(len(sizes), sum(sizes))


def _batches(keys: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]
