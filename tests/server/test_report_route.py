"""GET /qwen_vram/report on a real server: formats, refusals, and while a prompt runs."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

import PIL.Image
import pytest
from pack.demo.server import Server
from pack.tests.graphs import CLIP, encode, loader, preview, text_to_image

PATH = "/qwen_vram/report"


def ask(
    server: Server, query: str = "", method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, bytes, str]:
    """Status, body and type of an answer."""
    data = None if body is None else body.encode()
    request = urllib.request.Request(f"{server.url}{PATH}?{query}", data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.read(), response.headers.get_content_type()
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers.get_content_type()


def asked(server: Server, query: str = "") -> dict[str, Any]:
    """The report as JSON."""
    status, body, kind = ask(server, query)
    assert (status, kind) == (200, "application/json")
    return json.loads(body)


def test_the_report_names_the_models_in_json_and_text(server: Server) -> None:
    graph = {"clip": loader("TextEncoder", CLIP), "e": encode(str(uuid.uuid4())), **preview("e")}
    assert server.submit(graph).status == "success"
    told = asked(server)
    assert told["version"] == 1 and told["running"] is False and told["time"].endswith("Z")
    (ram,) = told["devices"]
    assert sum(part["bytes"] for part in ram["parts"]) == ram["total_bytes"]
    assert CLIP in [model["file"] for model in told["models"]]
    status, body, kind = ask(server, "format=text&device=cpu")
    assert (status, kind) == (200, "text/plain") and CLIP in body.decode()


def test_the_picture_comes_in_both_themes(server: Server) -> None:
    light, dark = (
        PIL.Image.open(io.BytesIO(ask(server, f"format=png&theme={theme}")[1])).convert("RGB")
        for theme in ("light", "dark")
    )
    assert light.size == dark.size and light.width == 800
    assert light.getpixel((1, 1)) == (255, 255, 255) != dark.getpixel((1, 1))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("format=html", "format must be one of: json, text, png."),
        ("theme=blue&format=png", "theme must be one of: dark, light."),
        ("theme=dark", "theme is only for format=png."),
        ("device=cuda:7", "device must be one of: cpu."),
        ("probe=true", "probe is no part of a GET, since it allocates: POST /qwen_vram/report"),
        ("fragments=", "fragments must be true or false."),
        ("fragment=true", "fragment is not known: use format, theme, device, fragments"),
    ],
)
def test_what_is_not_known_is_refused_with_a_sentence(
    server: Server, query: str, sentence: str
) -> None:
    status, body, _ = ask(server, query)
    assert status == 400 and json.loads(body)["error"].startswith(sentence)


def test_other_methods_and_other_origins_are_refused(server: Server) -> None:
    assert ask(server, method="DELETE")[0] == 405
    assert ask(server, method="POST", body="{}", Origin="null")[0] == 403
    for body, sentence in (
        ("", "The body is not JSON"),
        ('{"probe": true}', "probe is not known: use device."),
        ('{"device": "cuda:7"}', "device must be one of: cpu."),
    ):
        status, told, _ = ask(server, method="POST", body=body)
        assert status == 400 and json.loads(told)["error"].startswith(sentence)
    assert ask(server, Origin="http://evil.example")[0] == 403
    assert ask(server, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    # The host's own middleware lets this one pass.
    status, body, _ = ask(server, Referer="http://evil.example/page")
    assert status == 403 and "page of another origin" in json.loads(body)["error"]
    own = server.url.removesuffix("/")
    assert ask(server, Origin=own)[0] == 200


def test_reports_come_while_a_prompt_runs_and_the_probe_is_refused(server: Server) -> None:
    graph = text_to_image(str(uuid.uuid4()), seed=time.time_ns() % 10**9, steps=10_000)
    results: list[Any] = []
    work = threading.Thread(target=lambda: results.append(server.submit(graph)))
    work.start()
    during, probes, slowest = 0, [], 0.0
    while work.is_alive():
        start = time.perf_counter()
        if during == 1:
            status, body, _ = ask(server, method="POST", body="{}")
            assert status == 200
            told = json.loads(body)
        else:
            told = asked(server, "fragments=true")
        slowest = max(slowest, time.perf_counter() - start)
        (ram,) = told["devices"]
        assert sum(part["bytes"] for part in ram["parts"]) == ram["total_bytes"]
        if told["running"]:
            during += 1
            probes.append(ram["largest_allocation"])
            if during >= 10:  # again, should the first have come too early
                server.post_json("/interrupt", {})
        time.sleep(0.02)
    work.join()
    assert results[0].status == "interrupted" and during >= 10, (during, results)
    assert [probe["note"] for probe in probes if probe] in (
        [],
        ["Not tried: a prompt runs, and it needs the memory. Ask again when nothing runs."],
    )
    assert any(probes) and slowest < 30
