"""POST /qwen_vram/clear on the shared server: when it acts, what it answers, what it refuses."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import websocket
from pack.demo.server import HOST, Server
from pack.tests.graphs import CLIP, UNET, VAE, text_to_image

PATH = "/qwen_vram/clear"
# About a second of sampling; more where the machine is so busy that it was over too soon.
STEPS = (60, 600)


def post(server: Server, body: Any, method: str = "POST") -> tuple[int, Any]:
    """Status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + PATH, data=data, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def run(server: Server, graph: dict[str, Any]) -> set[str]:
    """The nodes that were executed."""
    result = server.submit(graph)
    assert result.status == "success", result.error
    return set(result.executed)


@contextmanager
def sampling(server: Server, steps: int) -> Iterator[None]:
    """While the sampler runs; afterwards the prompt is over."""
    begun, results = threading.Event(), []

    def note(event: str, data: dict[str, Any]) -> None:
        if event == "progress":
            begun.set()

    def work() -> None:
        seed = uuid.uuid4().int % 2**32
        results.append(server.submit(text_to_image(seed=seed, steps=steps), note))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    yield
    thread.join()
    assert results[0].status == "success", results[0].error


def while_sampling(server: Server, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer of a request that comes while the sampler runs."""
    for steps in STEPS:
        with sampling(server, steps):
            status, answer = post(server, body)
        if answer["when"] != "at once":
            break
    return status, answer


def test_a_get_frees_nothing_and_says_what_to_send(server: Server) -> None:
    status, answer = post(server, b"", "GET")
    assert status == 405 and "POST" in answer["error"]


def test_models_are_unloaded_at_once_when_nothing_runs(server: Server) -> None:
    graph = text_to_image(text=str(uuid.uuid4()), seed=11)
    run(server, graph)
    status, answer = post(server, {"level": "models", "kinds": ["VAE", "diffusion model"]})
    assert status == 200 and answer["done"] and answer["when"] == "at once"
    assert {UNET, VAE} <= {m["name"] for m in answer["unloaded"]}
    assert CLIP in {m["name"] for m in answer["kept"]}
    assert answer["devices"][-1]["kind"] == "cpu"
    assert run(server, graph) == set()  # node outputs are still there


def test_the_open_workflow_keeps_its_models(server: Server) -> None:
    graph = text_to_image(text=str(uuid.uuid4()), seed=12)
    run(server, graph)
    wanted = {"level": "models", "keep_needed": True, "prompt": {"vae": graph["vae"]}}
    status, answer = post(server, wanted)
    assert status == 200 and {m["name"] for m in answer["unloaded"]} >= {UNET, CLIP}
    assert [m["why"] for m in answer["kept"] if m["name"] == VAE] == ["the workflow needs it"]


def test_everything_forgets_node_outputs(server: Server) -> None:
    graph = text_to_image(seed=13)
    run(server, graph)
    status, answer = post(server, {"level": "everything"})
    assert (status, answer["when"]) == (200, "at once")
    assert {"unet", "sampler", "decode", "save"} <= run(server, graph)


def test_levels_that_are_wanted_together_are_done_one_by_one_by_the_worker(server: Server) -> None:
    """And beside ComfyUI's own button, which sets the same flags."""
    graph = text_to_image(seed=14)
    run(server, graph)
    wishes = [{"level": level} for level in ("everything", "models", "cache")] * 3
    with ThreadPoolExecutor(len(wishes) + 1) as pool:
        own = {"unload_models": True, "free_memory": True}
        host = pool.submit(server.post_json, "/free", own)
        answers = list(pool.map(lambda wish: post(server, wish), wishes))
        host.exception()  # its answer is empty, no JSON
    assert [(status, answer["when"]) for status, answer in answers] == [(200, "at once")] * 9
    assert {"unet", "sampler", "decode", "save"} <= run(server, graph)


def test_while_a_node_runs_it_waits_until_the_node_ends(server: Server) -> None:
    status, answer = while_sampling(server, {"level": "models", "wait_seconds": 60})
    assert (status, answer["when"]) == (200, "between two nodes")
    assert UNET in {m["name"] for m in answer["unloaded"]}


def test_everything_waits_until_the_prompt_ends(server: Server) -> None:
    status, answer = while_sampling(server, {"level": "everything", "wait_seconds": 60})
    assert (status, answer["when"]) == (200, "at the end of the prompt")


def asked_three_times(server: Server, steps: int) -> tuple[websocket.WebSocket, list[Any]]:
    """As by an impatient user while the sampler runs: what is told later, and the answers."""
    client = uuid.uuid4().hex
    address = f"ws://{HOST}:{server.port}/ws?clientId={client}"
    events = websocket.create_connection(address, timeout=60, http_no_proxy=[HOST])
    body = {"level": "cache", "wait_seconds": 0, "client_id": client}
    with sampling(server, steps):
        return events, [post(server, body) for _ in range(3)]


def test_who_does_not_wait_is_told_later(server: Server) -> None:
    for steps in STEPS:
        events, answers = asked_three_times(server, steps)
        if all(status == 202 for status, _ in answers):
            break
        events.close()
    try:
        for status, answer in answers:
            assert (status, answer["done"]) == (202, False)
            assert answer["when"] == "between two nodes" and "running node" in answer["text"]
        post(server, {"level": "cache"})  # so that there is something behind it
        told = []
        while not told or told[-1]["type"] != "qwen_vram.cleared":
            told.append(json.loads(events.recv()))
        assert told[-1]["data"]["done"] and told[-1]["data"]["when"] == "between two nodes"
        events.settimeout(0.5)
        with pytest.raises(websocket.WebSocketTimeoutException):
            while json.loads(events.recv())["type"] != "qwen_vram.cleared":
                pass
    finally:
        events.close()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not JSON"),
        (b"<html>", "The body is not JSON"),
        ([], "must be a JSON object"),
        ({}, "level must be cache, models or everything."),
        ({"level": "all"}, "level must be"),
        ({"level": 3}, "level must be text."),
        ({"level": "cache", "force": True}, "force is not known: use level, kinds"),
        ({"level": "models", "kinds": ["unet"]}, "kinds must be a list of one or more of"),
        ({"level": "models", "keep_needed": True}, "send it as prompt"),
        ({"level": "cache", "wait_seconds": 601}, "wait_seconds must be"),
    ],
)
def test_a_request_that_makes_no_sense_gets_a_sentence(server: Server, body, sentence) -> None:
    status, answer = post(server, body)
    assert status == 400 and sentence in answer["error"]


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    assert post(server, {"level": "cache"}, method)[0] in (404, 405)
