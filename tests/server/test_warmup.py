"""A warm-up through the real queue: nothing is left, nobody else sees it, a real run comes first."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket
from pack.demo.server import HOST, Server
from pack.tests.graphs import node, text_to_image

PATH = "/qwen_vram/warmup"
JSON = "application/json; charset=utf-8"
Graph = dict[str, Any]


def ask(
    server: Server, method: str, body: Any = None, query: str = "", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a request to the route."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + PATH + query, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if error.headers["Content-Type"] == JSON else text


def wait(server: Server, until: Callable[[Any], bool]) -> Any:
    """Ask for the state until it is what is waited for."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        _, report = ask(server, "GET")
        if until(report):
            return report
        time.sleep(0.02)
    raise AssertionError(f"{report}\n{server.log_tail()}")


def ended(report: Any) -> bool:
    return report["state"] in ("done", "failed", "cancelled")


def running(report: Any) -> bool:
    return report["state"] == "running" and report["percent"] > 0


def warm_up(server: Server, prompt: Graph) -> Any:
    """Warm up to the end."""
    status, report = ask(server, "POST", {"prompt": prompt})
    assert status == 200, report
    return wait(server, ended)


def files(server: Server) -> set[Path]:
    """All files that a run may write for the user."""
    folders = (server.base / name for name in ("output", "temp", "input"))
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def graph(**changes: Any) -> Graph:
    """A workflow that no other test has run."""
    return text_to_image(text=f"a fox {uuid.uuid4().hex}", **changes)


@contextlib.contextmanager
def listening(server: Server) -> Iterator[list[Any]]:
    """What another client gets to hear meanwhile."""
    heard: list[Any] = []
    address = f"ws://{HOST}:{server.port}/ws?clientId={uuid.uuid4().hex}"
    events = websocket.create_connection(address, timeout=60, http_no_proxy=[HOST])
    try:
        yield heard
        events.settimeout(0.3)
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            while True:
                heard.append(events.recv())
    finally:
        events.close()


def test_it_leaves_no_trace_and_nobody_sees_it(server: Server) -> None:
    prompt = graph(steps=8)
    region = {"x": 0, "y": 0, "width": 32, "height": 32}
    prompt["crop"] = node("ImageCropV2", image=["decode", 0], crop_region=region)  # shows it
    prompt["look"] = node("PreviewImage", images=["crop", 0])
    before, history = files(server), server.get_json("/history")
    with listening(server) as heard:
        report = warm_up(server, prompt)
    assert report["state"] == "done", report
    assert files(server) == before
    assert server.get_json("/history") == history
    assert {job["id"] for job in server.get_json("/api/jobs")["jobs"]} == history.keys()
    assert all(isinstance(message, str) for message in heard), "a picture was sent"
    assert {json.loads(message)["type"] for message in heard} == {"status"}
    result = report["result"]
    assert (result["encoded"] + result["known"], result["cache"]) == (2, "ram")
    assert result["stored"] == result["encoded"] >= 1
    assert 0 < result["kept_seconds"] < result["seconds"]
    assert {model["kind"] for model in result["models"]} >= {"diffusion model", "VAE"}


def test_the_real_run_takes_over_what_it_can(server: Server) -> None:
    prompt = graph(steps=3)
    assert warm_up(server, prompt)["state"] == "done"
    ran = server.submit(prompt)
    assert ran.status == "success"
    assert {"unet", "clip", "vae", "positive", "negative", "latent", "shift"} <= set(ran.cached)
    again = warm_up(server, prompt)["result"]
    assert (again["encoded"], again["known"]) == (0, 2)


def test_a_real_run_cancels_it(server: Server) -> None:
    status, _ = ask(server, "POST", {"prompt": graph(size=768)})
    assert status == 200
    wait(server, running)
    ran = server.submit(graph(steps=1))
    assert ran.status == "success"
    report = wait(server, ended)
    assert (report["state"], report["result"]) == ("cancelled", None)
    assert report["id"] not in server.get_json("/history")


def test_it_can_be_cancelled_and_only_one_waits(server: Server) -> None:
    _, first = ask(server, "POST", {"prompt": graph(size=768)})
    status, second = ask(server, "POST", {"prompt": graph()})
    assert status == 409 and "already waiting or running" in second["error"]
    assert second["code"] == "busy"
    status, told = ask(server, "DELETE", query="?id=one-that-is-over")
    assert (status, told["code"]) == (409, "another") and "left alone" in told["error"]
    assert ask(server, "DELETE", query="?ID=typo")[0] == 400
    assert ask(server, "GET")[1]["state"] in ("waiting", "running")
    assert not ask(server, "GET")[1]["cancelling"]
    assert ask(server, "DELETE", query=f"?id={first['id']}") == (200, {"cancelled": True})
    report = wait(server, ended)
    assert (report["id"], report["state"]) == (first["id"], "cancelled")
    assert ask(server, "DELETE") == (200, {"cancelled": False})
    assert server.get_json("/queue") == {"queue_running": [], "queue_pending": []}
    assert first["id"] not in server.get_json("/history")


def test_a_value_that_comfyui_refuses_is_told_with_its_node(server: Server) -> None:
    prompt = graph()
    prompt["vae"] = node("VAELoader", vae_name="nothing.safetensors")
    status, answer = ask(server, "POST", {"prompt": prompt})
    assert status == 400 and '"VAELoader" (vae): Value not in list' in answer["error"]


def test_one_that_fails_says_where_and_leaves_nothing(server: Server) -> None:
    broken = server.base / "input" / "broken.png"
    broken.write_bytes(b"no picture")
    prompt = graph()
    prompt["load"] = {**node("LoadImage", image=broken.name), "_meta": {"title": "My picture"}}
    prompt["latent"] = node("VAEEncode", pixels=["load", 0], vae=["vae", 0])
    report = warm_up(server, prompt)
    broken.unlink()
    assert (report["state"], report["result"]) == ("failed", None)
    assert report["error"].startswith('"My picture" (load): cannot identify image file')
    assert report["id"] not in server.get_json("/history")


@pytest.mark.parametrize(
    ("body", "said", "code"),
    [
        ({"prompt": {}}, "The prompt is empty", "empty_prompt"),
        ({"prompt": {"1": {}}}, "Node 1 of the prompt has no class_type", "invalid"),
        ({"prompt": {"1": node("NoSuchNode")}}, "there is no node NoSuchNode", "invalid"),
        ({"prompt": {"1": node("SaveImage", images=["2", 0])}}, "comes from node 2", "invalid"),
        ({"prompt": {"1": node("PrimitiveInt", value=1)}}, "nothing to warm", "nothing_to_warm"),
        ({"graph": {}}, "graph is not known", "invalid"),
        ([], "must be a JSON object", "invalid"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(server: Server, body, said, code) -> None:
    status, answer = ask(server, "POST", body)
    assert status == 400 and said in answer["error"] and answer["code"] == code


def test_other_origins_and_methods_are_refused(server: Server) -> None:
    for method in ("GET", "POST", "DELETE"):
        status, answer = ask(server, method, Referer="https://example.com/page")
        assert status == 403 and "another origin" in answer["error"]
    assert ask(server, "PUT")[0] == 405
