"""The routes of the prompt cache: what it holds, and its removal, on a real server."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
from pack.demo.server import Server, free_port
from pack.tests.conftest import missing
from pack.tests.graphs import CLIP, encode, loader, node, preview
from pack.tests.redis_server import eventually
from pack.tests.server.restarts import started_again

PATH = "/qwen_vram/conditioning"


@pytest.fixture(scope="module")
def own(server: Server) -> Server:
    """The shared server, under the flag by which ComfyUI lets pages of every origin in."""
    return started_again(server)


@pytest.fixture
def empty(own: Server) -> Server:
    """The same with nothing stored."""
    assert delete(own, "everything=true")[0] == 200
    return own


def delete(server: Server, query: str = "", prefix: str = "") -> tuple[int, dict[str, Any]]:
    """The status and the body of a DELETE request."""
    url = f"{server.url}{prefix}{PATH}?{query}"
    request = urllib.request.Request(url, method="DELETE")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def run(server: Server, *texts: str) -> list[dict[str, Any]]:
    """Encode texts, of which ComfyUI itself keeps nothing from the last time."""
    graph = {"clip": loader("TextEncoder", CLIP)}
    for number, text in enumerate(texts):
        graph[f"e{number}"] = encode(text)
        graph.update(preview(f"e{number}"))
    result = server.submit(graph)
    assert result.status == "success", result.error
    return [out["qwen_vram"][0] for i, out in result.outputs.items() if i[0] == "e"]


def on_disk(server: Server) -> int:
    """How many entries are there; they are written in the background."""
    return server.get_json(PATH)["disk"]["entries"]


def test_the_report_counts_what_is_there(empty: Server) -> None:
    before = empty.get_json(PATH)
    assert before["disk"] == {"entries": 0, "bytes": 0, "bound_bytes": 2_000_000_000}
    assert before["total"] == {"hits": 0, "misses": 0, "seconds_saved": 0.0}
    assert before["redis"]["state"] == "off" and before["redis"]["entries"] is None
    assert {"CLIPTextEncode", "VAEEncode"} <= set(before["encode_nodes"])
    run(empty, f"one {uuid.uuid4()}", f"two {uuid.uuid4()}")
    assert eventually(lambda: on_disk(empty) == 2)
    after = empty.get_json(f"/api{PATH}")
    files = list(Path(after["folder"]).iterdir())
    assert after["disk"]["entries"] == after["memory"]["entries"] == len(files) == 2
    assert after["disk"]["bytes"] == sum(file.stat().st_size for file in files)
    assert after["now"]["misses"] == after["total"]["misses"] == 2


def test_a_hit_is_counted_with_the_time_that_it_saved(empty: Server) -> None:
    text = str(uuid.uuid4())
    run(empty, text)
    run(empty, str(uuid.uuid4()))  # ComfyUI forgets the first result
    (status,) = run(empty, text)
    assert status["result"] == "hit"
    told = empty.get_json(PATH)
    assert told["total"]["hits"] == 1
    assert told["total"]["seconds_saved"] == pytest.approx(status["seconds_saved"])


def test_clearing_tells_what_it_removed_and_keeps_the_totals(empty: Server) -> None:
    run(empty, str(uuid.uuid4()))
    assert eventually(lambda: on_disk(empty) == 1)
    status, removed = delete(empty, "unused_days=1")
    assert status == 200 and removed["disk"]["entries"] == removed["memory"]["entries"] == 0
    status, removed = delete(empty)
    assert status == 200 and removed["failed"] == []
    assert removed["disk"]["entries"] == removed["memory"]["entries"] == 1
    told = empty.get_json(PATH)
    assert told["disk"]["entries"] == told["memory"]["entries"] == 0
    assert told["total"]["misses"] == 1


def test_everything_leaves_no_trace_of_a_prompt(empty: Server) -> None:
    run(empty, str(uuid.uuid4()))
    folder = Path(empty.get_json(PATH)["folder"]).parent
    (folder / "pins").mkdir(exist_ok=True)
    (folder / "pins" / f"{'a' * 64}.safetensors").write_bytes(b"a pinned value")
    (folder / "pins" / "notes.txt").write_text("not ours")
    lists = empty.base / "temp" / "qwen_vram"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "sent.txt").write_text("a list")
    status, removed = delete(empty, "everything=true")
    assert status == 200 and removed["failed"] == [] and removed["pins"]["entries"] == 1
    assert removed["lists"] == 1 and removed["totals"] is True
    again = delete(empty, "everything=true")[1]
    assert (again["pins"]["entries"], again["lists"], again["totals"]) == (0, 0, False)
    left = [file.name for file in folder.rglob("*") if file.is_file()]
    assert left == ["notes.txt"] and not list(lists.iterdir())
    assert empty.get_json(PATH)["total"]["misses"] == 0
    (folder / "pins" / "notes.txt").unlink()


def test_a_removal_tells_whether_redis_answered(empty: Server) -> None:
    assert delete(empty, "everything=true")[1]["redis"]["state"] == "off"
    if importlib.util.find_spec("redis") is None:
        missing("the package redis (requirements-test.txt)")
    setting = "QwenVRAM.Conditioning.RedisURL"
    empty.post_json("/api/settings", {setting: f"redis://127.0.0.1:{free_port()}/0"})
    try:
        status, removed = delete(empty, "everything=true")
        assert status == 200 and removed["redis"]["state"] == "away"
        assert removed["redis"]["entries"] is None
    finally:
        empty.post_json("/api/settings", {setting: ""})


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("unused_days=many", "unused_days must be a number from 0 to 36500."),
        ("unused_days=-1", "unused_days must be a number"),
        ("unused_days=nan", "unused_days must be a number"),
        ("unused_days=1e99", "unused_days must be a number"),
        ("unused_days=", "unused_days must be a number"),
        ("everything=false", "everything=false alone does not say what to remove"),
        ("everything=perhaps", "everything must be true or false."),
        ("everything=true&unused_days=3", "everything=true takes no unused_days"),
        ("unuseddays=3", "unuseddays is not known"),
    ],
)
def test_a_request_that_makes_no_sense_removes_nothing(
    empty: Server, query: str, sentence: str
) -> None:
    run(empty, str(uuid.uuid4()))
    status, answer = delete(empty, query, "/api")
    assert status == 400 and sentence in answer["error"]
    assert eventually(lambda: on_disk(empty) == 1)


def test_settings_count_at_once(empty: Server) -> None:
    name = "QwenVRAM.Conditioning"
    wanted = {f"{name}.Keep": "nothing", f"{name}.DiskGB": 0.5, f"{name}.MoreNodes": "A, B"}
    usual = {f"{name}.Keep": "all encode nodes", f"{name}.DiskGB": 2, f"{name}.MoreNodes": ""}
    empty.post_json("/api/settings", wanted)
    try:
        told = empty.get_json(PATH)
        assert told["keep"] == "nothing" and told["disk"]["bound_bytes"] == 500_000_000
        assert {"A", "B"} <= set(told["encode_nodes"])
        (status,) = run(empty, str(uuid.uuid4()))
        assert status["why"] == "nothing is kept, by the settings"
        told = empty.get_json(PATH)
        assert told["disk"]["entries"] == told["total"]["misses"] == 0
    finally:
        empty.post_json("/api/settings", usual)


def test_a_list_is_filled_in_over_http_alone(empty: Server) -> None:
    inputs = {"clip": ["clip", 0], "prompts": "a\nb", "file": "", "cache": "memory and disk"}
    graph = {"clip": loader("TextEncoder", CLIP), "p": node("QwenVRAMPrefill", **inputs)}
    result = empty.submit(graph)
    assert result.outputs["p"]["qwen_vram"][0]["encoded"] == 2
    assert [status["result"] for status in run(empty, "a", "b")] == ["hit", "hit"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", PATH),
        ("DELETE", PATH),
        ("GET", "/qwen_vram/pins"),
        ("DELETE", "/qwen_vram/pins"),
        ("DELETE", "/qwen_vram/pins/abc"),
        ("POST", "/qwen_vram/clear"),
        ("POST", "/api/qwen_vram/clear"),
        ("GET", "/qwen_vram/report"),
        ("GET", "/qwen_vram/warmup"),
        ("POST", "/qwen_vram/warmup"),
        ("DELETE", "/qwen_vram/warmup"),
    ],
)
def test_a_page_of_another_origin_gets_nothing(empty: Server, path: str, method: str) -> None:
    run(empty, str(uuid.uuid4()))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = {"method": method, "data": b'{"level": "cache"}' if method == "POST" else None}
    for origin in ("http://evil.example", "null"):
        request = urllib.request.Request(empty.url + path, headers={"Origin": origin}, **asked)
        with pytest.raises(urllib.error.HTTPError) as error:
            opener.open(request, timeout=60)
        assert error.value.code == 403
        assert "another origin" in json.loads(error.value.read())["error"]
    assert empty.get_json(PATH)["memory"]["entries"] == 1  # the disk has it soon
    if method != "DELETE":
        request = urllib.request.Request(empty.url + path, headers={"Origin": empty.url}, **asked)
        if (method, path) == ("POST", "/qwen_vram/warmup"):  # it is let in, and has no level
            with pytest.raises(urllib.error.HTTPError, match="400"):
                opener.open(request, timeout=60)
        else:
            assert opener.open(request, timeout=60).status == 200
