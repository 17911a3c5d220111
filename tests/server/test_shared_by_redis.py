"""Two ComfyUI servers and one Redis: what one encoded, the other draws without an encoder."""

from __future__ import annotations

import io
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
from pack.core.redis_tier import SIZES
from pack.demo.server import Server, link_folder
from pack.tests import official
from pack.tests.conftest import ROOT
from pack.tests.redis_server import PASSWORD, RedisServer, eventually, need_redis

TEMPLATE = "image_qwen_Image_2512"
PROMPT = "a red bunny on the beach"
MARK = uuid.uuid4().hex  # in texts that no other test has drawn on the shared server


REDIS = "QwenVRAM.Conditioning.RedisURL"


class Pair(NamedTuple):
    """Two servers with folders of their own and the same model files; they share Redis."""

    redis: RedisServer
    first: Server
    second: Server


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that a test may kill."""
    need_redis()
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def pair(
    server: Server, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """The shared server is told of Redis by the setting, the other one by the variable."""
    base = tmp_path_factory.mktemp("other")
    # Copies have times of their own, by which a file is known, so the files are the same.
    link_folder(base / "models", server.base / "models")
    shutil.copytree(ROOT / "tests" / "teach_stock", base / "custom_nodes" / "teach_stock")
    options = {"cpu": True, "extra_args": ["--use-pytorch-cross-attention"]}
    options["start_seconds"] = 600.0
    options["environment"] = {"QWEN_VRAM_REDIS_URL": redis_server.url}
    server.post_json("/api/settings", {REDIS: redis_server.url})
    try:
        with Server(server.comfyui, base, ROOT, **options) as second:
            yield Pair(redis_server, server, second)
    finally:
        server.post_json("/api/settings", {REDIS: ""})


def graph(server: Server, text: str) -> dict[str, Any]:
    """The official template: every node that encodes or loads is a stock one."""
    made = official.template(TEMPLATE, server.get_json("/object_info"))
    encodes = [n["inputs"] for n in made.values() if n["class_type"] == "CLIPTextEncode"]
    for number, inputs in enumerate(encodes):
        inputs["text"] = f"{text} {number} {MARK}"
    for node in made.values():
        if node["class_type"] == "KSampler":
            node["inputs"].update(steps=1, cfg=2.0)
    return made


class Run(NamedTuple):
    """The picture, the classes of the nodes that ran, and what the badges of the others say."""

    picture: np.ndarray
    ran: set[str]
    badges: list[tuple[str, str | None]]


def run(server: Server, text: str) -> Run:
    """Draw."""
    told: list[dict[str, Any]] = []
    wanted = graph(server, text)
    result = server.submit(wanted, lambda e, data: told.append(data) if "qwen_vram" in e else None)
    assert result.status == "success", result.error
    picture = np.asarray(PIL.Image.open(io.BytesIO(result.images[0].content)))
    ran = {wanted[node]["class_type"] for node in result.executed}
    return Run(picture, ran, [(fact["result"], fact.get("tier")) for fact in told])


def lines(server: Server, redis: RedisServer) -> list[str]:
    """What the log says of this Redis not being there."""
    found = (line for line in server.log_text().splitlines() if "not shared by" in line)
    return [line for line in found if f":{redis.port}" in line]


def connected(server: Server) -> bool:
    """Whether it can ask Redis now."""
    return server.get_json("/qwen_vram/conditioning")["redis"]["state"] == "connected"


def complaints(pair: Pair) -> list[str]:
    """What both have said of Redis so far."""
    return lines(pair.first, pair.redis) + lines(pair.second, pair.redis)


def test_what_one_encoded_the_other_does_not_encode(pair: Pair) -> None:
    # No prompt waits longer than a tenth of a second for Redis: on a busy machine it may miss some.
    for attempt in range(5):
        assert eventually(lambda: connected(pair.first) and connected(pair.second))
        before = complaints(pair)
        pair.redis.client().flushall()
        made = run(pair.first, f"{PROMPT} {attempt}")
        assert {"CLIPLoader", "CLIPTextEncode"} <= made.ran
        assert made.badges == [("miss", None)] * 2
        sent = eventually(lambda: pair.redis.client().hlen(SIZES) == 2, 10)
        again = run(pair.second, f"{PROMPT} {attempt}")
        if complaints(pair) == before:
            break
    assert sent
    assert again.badges == [("hit", "redis")] * 2
    assert not again.ran & {"CLIPLoader", "CLIPTextEncode"} and "KSampler" in again.ran
    assert np.array_equal(again.picture, made.picture) and made.picture.std() > 1


def test_without_redis_both_draw_and_one_line_says_so(pair: Pair) -> None:
    known = len(lines(pair.second, pair.redis))
    pair.redis.kill()
    for text in ("a blue fox", "a green bear"):
        assert run(pair.second, text).badges[0] == ("miss", None)
    assert eventually(lambda: len(lines(pair.second, pair.redis)) == known + 1)
    assert "it cannot be reached" in lines(pair.second, pair.redis)[-1]


def test_a_wrong_password_is_one_line_and_it_draws(pair: Pair, tmp_path: Path) -> None:
    locked = RedisServer(tmp_path, "--requirepass", PASSWORD)
    try:
        url = f"redis://:wrong-one@127.0.0.1:{locked.port}/0"
        pair.first.post_json("/api/settings", {REDIS: url})
        for text in ("a black cat", "a white dog"):
            assert run(pair.first, text).badges[0] == ("miss", None)
        refusals = [
            line for line in lines(pair.first, locked) if "it refuses the user or pass" in line
        ]
        assert len(refusals) == 1
        assert "wrong-one" not in pair.first.log_text()
    finally:
        locked.kill()
