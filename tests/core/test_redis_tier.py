"""Redis as a third tier, against a real server: shared, verified, bounded, and never waited for."""

from __future__ import annotations

import hashlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from pack.core import conditioning_codec as codec
from pack.core import redis_tier
from pack.core.conditioning_store import ConditioningStore
from pack.core.redis_tier import ENTRY, PREFIX, SIZES, USED, RedisTier
from pack.core.statistics import Size
from pack.tests.core.test_conditioning_codec import same, values
from pack.tests.examples import examples
from pack.tests.redis_server import ENCODED, PASSWORD, eventually, need_redis
from pack.tests.redis_server import RedisServer as Server

LOOKUPS = 20
OWN_ANSWER_SECONDS = redis_tier.ANSWER_SECONDS


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer than these is a miss, rightly, but a machine may be busy."""
    for name in ("ANSWER_SECONDS", "CONNECT_SECONDS", "WRITE_SECONDS", "USAGE_SECONDS"):
        monkeypatch.setattr(redis_tier, name, 30.0)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """A prompt waits so many seconds for an answer; all that is told apart takes many times as long."""
    monkeypatch.setattr(redis_tier, "ANSWER_SECONDS", 0.5)
    return 0.5


@pytest.fixture(scope="session")
def package() -> None:
    """What these tests need."""
    need_redis()


@pytest.fixture(scope="module")
def shared_server(package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that do not kill it."""
    running = Server(tmp_path_factory.mktemp("redis"))
    yield running
    running.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """An empty server."""
    shared_server.client().flushall()
    return shared_server


@pytest.fixture
def own_server(package, tmp_path: Path) -> Iterator[Server]:
    """A server to kill."""
    running = Server(tmp_path)
    yield running
    running.kill()


@pytest.fixture
def tier() -> Iterator[Callable[..., RedisTier]]:
    """Make tiers that are closed after the test."""
    made = []

    def make(url: str, ttl: int = 100, limit: int = 1 << 20, connected: bool = True) -> RedisTier:
        made.append(RedisTier(url, ttl, limit))
        if connected:
            assert eventually(lambda: made[-1].state == "connected"), made[-1].reason
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def machine(tmp_path: Path, tier) -> Callable[..., ConditioningStore]:
    """Make stores of machines that share nothing but Redis."""
    count = iter(range(1000))

    def make(url: str, **options: object) -> ConditioningStore:
        directory = tmp_path / f"machine{next(count)}"
        return ConditioningStore(directory, 1 << 20, 1 << 20, tier(url, **options))

    return make


def key(name: object) -> str:
    """A key as the node makes it."""
    return hashlib.sha256(str(name).encode()).hexdigest()


def entry(number: int, floats: int = 1000) -> codec.Entry:
    """About 4 kB."""
    value = [[torch.full((1, floats), float(number)), {"pooled_output": None}]]
    return codec.Entry(value, 1.0, {"text": "t"}, "cpu")


def put(store: ConditioningStore, *numbers: int) -> None:
    """Entries filled with their numbers, in Redis when this returns."""
    for number in numbers:
        assert store.put(key(number), entry(number)) is None
    assert store.flush()


def found(store: ConditioningStore, number: int) -> tuple[str, float] | None:
    """The tier, and the number that the entry was filled with."""
    hit = store.lookup(key(number))
    return hit and (hit.tier, hit.entry.value[0][0][0, 0].item())


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def looked_up(store: ConditioningStore) -> list[float]:
    """Seconds of lookups of what is not there."""
    return [timed(lambda n=n: store.lookup(key(n))) for n in range(100, 100 + LOOKUPS)]


def stored(store: ConditioningStore) -> float:
    """Seconds that it takes to put an entry, the best of several on a busy machine."""
    return min(timed(lambda n=n: store.put(key(n), entry(n))) for n in range(200, 205))


def test_another_machine_finds_the_prompt_and_then_has_it_itself(server, machine) -> None:
    put(machine(server.url), 1)
    other = machine(server.url)
    assert found(other, 1) == ("redis", 1.0)
    assert found(other, 1) == ("memory", 1.0) and other.flush()
    again = ConditioningStore(other.directory, 1 << 20, 1 << 20)
    assert found(again, 1) == ("disk", 1.0)
    assert machine(server.url).lookup(key(1), disk=False) is None


def test_another_process_finds_the_prompt(server, machine, tmp_path) -> None:
    put(machine(server.url), 1)
    program = f"""
import sys, time; sys.path.insert(0, {str(Path(redis_tier.__file__).parents[1])!r})
from pathlib import Path
from core.conditioning_store import ConditioningStore
from core import redis_tier
from core.redis_tier import RedisTier
redis_tier.ANSWER_SECONDS = 30.0
store = ConditioningStore(Path({str(tmp_path / "p")!r}), 1, 0, RedisTier({server.url!r}, 9, 1 << 20))
while store._redis.state != "connected": time.sleep(0.01)
print(store.lookup({key(1)!r}).entry.value[0][0][0, 0].item())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "1.0\n", run.stderr


def test_any_structure_goes_through_redis_unchanged(server, machine, tier, tmp_path) -> None:
    writer = machine(server.url)
    reader = ConditioningStore(tmp_path / "none", 0, 0, tier(server.url))
    count = iter(range(1000))

    @given(values)
    @settings(max_examples=examples(40), deadline=None)
    def check(value: object) -> None:
        number = next(count)
        assert writer.put(key(number), codec.Entry(value, 1.5, {"text": "t"}, "cpu")) is None
        assert writer.flush()
        hit = reader.lookup(key(number))
        assert hit.tier == "redis" and same(hit.entry.value, value)
        assert (hit.entry.seconds, hit.entry.parts) == (1.5, {"text": "t"})

    check()


def test_memory_mode_sends_nothing(server, machine) -> None:
    store = machine(server.url)
    store.put(key(1), entry(1), disk=False)
    assert store.flush() and server.client().dbsize() == 0


def test_a_damaged_entry_is_deleted_and_a_miss(server, machine, caplog) -> None:
    put(machine(server.url), 1)
    data = server.client().get(ENTRY + key(1))
    spoiled = {2: b"", 3: data[:-1] + b"\xff", 4: data[:99], 5: b"foreign" * 100}
    for number, content in spoiled.items():
        server.client().set(ENTRY + key(number), content)
    server.client().rpush(ENTRY + key(6), "a list")
    other = machine(server.url)
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert [found(other, n) for n in (*spoiled, 6)] == [None] * 5
    assert other.flush() and found(other, 1) == ("redis", 1.0)
    assert not any(server.client().exists(ENTRY + key(n)) for n in (3, 4, 5, 6))
    assert caplog.text.count("in Redis is damaged") == 3


def test_an_entry_lives_for_its_time_after_its_last_use(server, machine) -> None:
    put(machine(server.url, ttl=100), 1, 2)
    client = server.client()
    assert 90 < client.ttl(ENTRY + key(1)) <= 100
    for number in (1, 2):
        client.expire(ENTRY + key(number), 10)
    other = machine(server.url, ttl=100)
    assert found(other, 1) and other.flush()
    assert client.ttl(ENTRY + key(1)) > 90 and client.ttl(ENTRY + key(2)) <= 10
    client.pexpire(ENTRY + key(1), 1)
    time.sleep(0.05)
    assert found(machine(server.url), 1) is None


def test_entries_that_redis_evicted_are_misses_and_count_no_longer(server, machine) -> None:
    store = machine(server.url)
    put(store, 1, 2, 3)
    size = store.usage().redis.bytes // 3
    assert store.usage().redis == Size(3, 3 * size)
    server.client().unlink(ENTRY + key(2))
    assert found(machine(server.url), 2) is None
    assert store.usage().redis == Size(2, 2 * size)
    assert server.client().zcard(USED) == server.client().hlen(SIZES) == 2


def test_a_server_with_a_small_memory_evicts_or_refuses_and_nothing_breaks(
    package, machine, tmp_path, caplog
) -> None:
    for policy in ("allkeys-lru", "noeviction"):
        full = Server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", policy)
        try:
            store = machine(full.url, limit=100 << 20)
            with caplog.at_level(logging.WARNING, "qwen_vram"):
                for number in range(60):
                    store.put(key(number), entry(number, 20_000))
                assert store.flush()
            other = machine(full.url, limit=100 << 20)
            hits = [found(other, number) for number in range(60)]
            assert 0 < sum(hit is not None for hit in hits) < 60
            assert all(hit == ("redis", float(n)) for n, hit in enumerate(hits) if hit)
            assert other.flush()
        finally:
            full.kill()
        refusals = 0 if policy == "allkeys-lru" else 2  # one of each machine
        assert caplog.text.count("does not take prompts") == refusals
    assert "maxmemory" in caplog.text


def test_the_bound_holds_for_all_senders_and_the_least_recently_used_goes(server, machine) -> None:
    size = len(codec.encode(entry(0)))
    stores = [machine(server.url, limit=8 * size) for _ in range(2)]
    for number in range(6):
        put(stores[number % 2], number)
    assert found(machine(server.url), 0) and server.client().zscore(USED, key(0))
    reader = machine(server.url)
    assert found(reader, 0) == ("redis", 0.0) and reader.flush()  # used again
    for number in range(6, 12):
        put(stores[number % 2], number)
        held = [server.client().strlen(k) for k in server.client().keys(ENTRY + "*")]
        assert sum(held) <= 9 * size
    other = machine(server.url)
    assert found(other, 11) and found(other, 0) is not None and found(other, 1) is None


def test_what_is_larger_than_the_bound_is_neither_sent_nor_read(server, machine) -> None:
    size = len(codec.encode(entry(1)))
    server.client().config_resetstat()
    put(machine(server.url, limit=size - 1), 1)
    assert "cmdstat_set" not in server.client().info("commandstats")
    put(machine(server.url, limit=size), 1)
    assert found(machine(server.url, limit=size - 1), 1) is None
    assert found(machine(server.url, limit=size), 1) == ("redis", 1.0)


def test_clear_removes_our_keys_only(server, machine) -> None:
    client = server.client()
    client.set("theirs", 1)
    store = machine(server.url)
    put(store, 1, 2, 3)
    client.zadd(USED, {key(1): 100.0})
    assert store.clear(unused_seconds=1000).redis.entries == 1
    other = machine(server.url)
    assert found(other, 1) is None and found(other, 2) and other.flush()
    client.set(ENTRY + key(9), b"in no list")
    assert store.clear().redis.entries == 2
    assert client.keys("*") == [b"theirs"] and not client.keys(PREFIX + "*")


def test_a_server_killed_in_between_costs_little_once_and_comes_back(
    own_server, machine, soon, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(redis_tier, "RETRY_SECONDS", 0.2)
    store = machine(own_server.url)
    put(store, 1)
    own_server.kill()
    caplog.set_level(logging.INFO, "qwen_vram")
    assert sum(looked_up(store)) < LOOKUPS * soon / 2
    assert eventually(lambda: store._redis.state == "unreachable")
    assert stored(store) < soon and store.flush()
    assert store.usage().redis is None and store.clear(1000).redis is None
    time.sleep(0.5)
    assert caplog.text.count("it cannot be reached") == 1
    own_server.start()
    assert eventually(lambda: store._redis.state == "connected")
    assert eventually(lambda: "is connected" in caplog.text)  # written a moment later
    put(store, 3)
    assert found(machine(own_server.url), 3) == ("redis", 3.0)


def test_a_prompt_waits_for_a_tenth_of_a_second() -> None:
    assert OWN_ANSWER_SECONDS == 0.1


def test_a_server_that_hangs_costs_one_answer_once(own_server, machine, soon, monkeypatch) -> None:
    store = machine(own_server.url)
    monkeypatch.setattr(redis_tier, "RETRY_SECONDS", 60.0)
    own_server.process.send_signal(signal.SIGSTOP)
    times = looked_up(store)
    assert times[0] > 0.9 * soon and sum(times) < LOOKUPS * soon / 2
    own_server.process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert store._redis.state == "unreachable"  # one that is slow now and then is not tried at once


def test_a_connection_that_was_closed_for_idleness_is_made_again_in_time(server, machine) -> None:
    put(machine(server.url), 1)
    other = machine(server.url)
    server.client().client_kill_filter(_type="normal", skipme=True)
    assert found(other, 1) == ("redis", 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "10.255.255.1", "no-such-host.invalid"])
def test_a_server_that_was_never_there_costs_one_answer_once(
    package, machine, soon, host, caplog
) -> None:
    made = []
    seconds = timed(lambda: made.append(machine(f"redis://{host}", connected=False)))
    assert seconds < redis_tier.CONNECT_SECONDS / 2
    assert sum(looked_up(made[0])) < LOOKUPS * soon / 2
    assert stored(made[0]) < soon


def test_a_connection_that_takes_long_is_waited_for_once(
    package, machine, soon, monkeypatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(RedisTier, "_open", lambda tier: gate.wait(60) and None)
    store = machine("redis://127.0.0.1:1", connected=False)
    times = looked_up(store)
    assert times[0] > 0.9 * soon and sum(times) < LOOKUPS * soon / 2
    gate.set()
    monkeypatch.undo()
    store._redis._closed.set()


def test_a_large_entry_may_take_longer_than_the_answer(server, machine, monkeypatch) -> None:
    monkeypatch.setattr(redis_tier, "ANSWER_SECONDS", OWN_ANSWER_SECONDS)
    store = machine(server.url, limit=100 << 20)
    store.configure(memory_bytes=100 << 20, disk_bytes=100 << 20)
    assert store.put(key(1), entry(1, 5_000_000)) is None and store.flush()
    # Of one answer a busy machine may take longer over some part: then it is a miss.
    tries = (found(machine(server.url, limit=100 << 20), 1) for _ in range(5))
    assert ("redis", 1.0) in tries


def test_several_threads_share_one_connection(server, machine) -> None:
    put(machine(server.url), *range(40))
    other, wrong = machine(server.url), []

    def ask(start: int) -> None:
        wrong.extend(n for n in range(start, 40, 4) if found(other, n) != ("redis", float(n)))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.fixture
def locked(package, tmp_path) -> Iterator[Server]:
    """A server with a password."""
    running = Server(tmp_path, "--requirepass", PASSWORD)
    yield running
    running.kill()


@pytest.mark.parametrize("user", ["", ":wr%2Fong@", f"nobody:{ENCODED}@"])
def test_a_wrong_password_is_one_sentence_that_does_not_tell_it(
    locked, tier, user, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(redis_tier, "RETRY_SECONDS", 0.05)
    with caplog.at_level(logging.DEBUG, "qwen_vram"):
        refused = tier(f"redis://{user}127.0.0.1:{locked.port}", connected=False)
        assert eventually(lambda: refused.state == "refused")
        time.sleep(0.3)
        assert refused.fetch(key(1)) is None
    assert len(caplog.records) == 1
    assert "Correct them in the Redis URL of the settings" in caplog.text
    for secret in (PASSWORD, ENCODED, "wr/ong", "wr%2Fong"):
        assert secret not in caplog.text + refused.reason + refused.where


def test_the_right_password_works(locked, machine) -> None:
    url = f"redis://:{ENCODED}@127.0.0.1:{locked.port}/3"
    put(machine(url), 1)
    assert found(machine(url), 1) == ("redis", 1.0)
    assert locked.client(password=PASSWORD, db=3).exists(ENTRY + key(1))


def test_an_error_that_holds_the_password_is_told_without_it(package, tier) -> None:
    one = tier(f"redis://:{ENCODED}@127.0.0.1:1", connected=False)
    words = one._words(OSError(f"redis://:x@host and {PASSWORD} and {ENCODED} failed."))
    assert words == "redis://***@host and *** and *** failed"


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost", "http://h", "redis://", "redis:///0", "redis://:pw9@h:port"),
        *("redis://h/name", "redis://h?decode_responses=1", "redis://:pw9@[::1", "rediss://"),
    ],
)
def test_what_is_no_url_is_told_with_the_remedy_and_without_the_password(package, url) -> None:
    with pytest.raises(ValueError, match=r"write redis://\[\[user\]:password@\]host") as error:
        RedisTier(url, 100, 100)
    assert "pw9" not in str(error.value) and error.value.__cause__ is None


def test_no_time_to_live_is_told(package) -> None:
    with pytest.raises(ValueError, match="at least a second"):
        RedisTier("redis://127.0.0.1:1", 0, 100)


def test_a_missing_package_is_told_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match="pip install redis"):
        RedisTier("redis://127.0.0.1:1", 100, 100)


def test_the_tier_can_be_changed_and_taken_away_while_running(server, machine, tier) -> None:
    store = machine(server.url)
    before = store._redis
    store.configure(redis=None)
    assert store.flush() and eventually(lambda: before.state == "closed")
    put(store, 1)
    assert server.client().dbsize() == 0
    store.configure(redis=tier(server.url))
    put(store, 2)
    assert found(machine(server.url), 2) == ("redis", 2.0)
    store.configure(memory_bytes=1 << 20)
    assert store._redis.state == "connected"
