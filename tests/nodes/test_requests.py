"""What the routes ask of a request: where it comes from, and what is in its body."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
from aiohttp import web
from aiohttp.streams import StreamReader
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

HERE = "http://127.0.0.1:8188"
KNOWN = {"level": str, "kinds": list, "deep": bool, "size": float, "count": int, "graph": dict}


@pytest.fixture(scope="module")
def requests(host) -> Any:
    """The module of the loaded pack."""
    return host.part("nodes.requests")


def status(requests, *headers: tuple[str, str], own: str = "127.0.0.1:8188") -> int:
    """What a request with these headers gets."""
    given = CIMultiDict([("Host", own), *headers] if own else headers)
    answer = requests.refused(make_mocked_request("POST", "/qwen_vram/clear", given))
    if answer is None:
        return 200
    told = json.loads(answer.body)
    assert "another origin" in told["error"] and told["code"] == "other_origin"
    return answer.status


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("User-Agent", "curl/8"),),
        (("Origin", HERE),),
        (("Referer", f"{HERE}/?x=http://evil.example"),),
        (("Origin", HERE), ("Sec-Fetch-Site", "same-origin")),
        (("Sec-Fetch-Site", "none"),),
    ],
)
def test_our_own_pages_and_scripts_are_let_in(requests, headers) -> None:
    assert status(requests, *headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        (("Origin", "http://evil.example"),),
        (("Origin", "http://evil.example:8188"),),
        (("Origin", "null"),),
        (("Origin", ""),),
        (("Origin", "http://127.0.0.1:3000"),),  # another server of the same machine
        (("Origin", "http://127.0.0.1"),),
        (("Origin", "http://127.0.0.1:8188.evil.example"),),
        (("Origin", "http://127.0.0.1:8188@evil.example"),),
        (("Origin", "http://localhost:8188"),),
        (("Origin", "http://127.0.0.1:99999"),),
        (("Origin", "http://[127.0.0.1:8188"),),
        (("Origin", "file://127.0.0.1:8188"),),
        (("Referer", "http://evil.example/127.0.0.1:8188"),),
        (("Sec-Fetch-Site", "cross-site"),),
        (("Sec-Fetch-Site", "same-site"),),
        (("Sec-Fetch-Site", "cross-site"), ("Origin", HERE)),
        (("Sec-Fetch-Site", "same-origin"), ("Origin", "http://evil.example")),
        (("Origin", HERE), ("Origin", "http://evil.example")),
    ],
)
def test_pages_of_other_origins_are_refused(requests, headers) -> None:
    assert status(requests, *headers) == 403


@pytest.mark.parametrize(
    ("own", "origin", "wanted"),
    [
        ("comfy.example", "https://comfy.example", 200),  # behind a proxy that ends TLS
        ("comfy.example:443", "https://comfy.example", 200),
        ("COMFY.example:8188", "http://comfy.EXAMPLE:8188", 200),
        ("[::1]:8188", "http://[::1]:8188", 200),
        ("192.168.1.7:8188", "http://192.168.1.8:8188", 403),  # where the host does not compare
        ("comfy.example:8188", "https://comfy.example", 403),
        ("", "http://evil.example", 403),
        ("", "http://", 403),
        (":::", HERE, 403),
    ],
)
def test_name_and_port_are_compared_on_every_address(requests, own, origin, wanted) -> None:
    assert status(requests, ("Origin", origin), own=own) == wanted


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
def test_an_origin_that_is_not_ours_is_never_let_in(host, origin) -> None:
    if origin.lower().strip() != HERE:
        answered = status(host.part("nodes.requests"), ("Origin", f"x{origin}"))
        assert answered == 403


def read(host, body: bytes, known: dict[str, type] = KNOWN) -> dict[str, Any]:
    """What json_body makes of a body."""
    requests = host.part("nodes.requests")

    async def answer() -> dict[str, Any]:
        request = make_mocked_request("POST", "/", payload=(stream := _stream(host.loop)))
        stream.feed_data(body)
        stream.feed_eof()
        assert isinstance(request, web.Request)
        return await requests.json_body(request, known)

    return host.loop.run_until_complete(answer())


def _stream(loop) -> StreamReader:
    return StreamReader(mock.Mock(_reading_paused=False), 2**16, loop=loop)


def test_a_body_of_known_fields_is_read(host) -> None:
    given = {"level": "cache", "kinds": ["VAE"], "deep": False, "size": 2, "graph": {"1": {}}}
    assert read(host, json.dumps(given).encode()) == given
    assert read(host, b"{}") == {}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not JSON"),
        (b"level=cache", "The body is not JSON"),
        (b"\xff\xfe\x00", "The body is not JSON"),
        (b"[" * 100_000, "The body is not JSON"),
        (b'{"size": NaN}', "The body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"levle": "cache"}', "levle is not known: use level, kinds"),
        (b'{"level": 1}', "level must be text."),
        (b'{"level": null}', "level must be text."),
        (b'{"kinds": "VAE"}', "kinds must be a list."),
        (b'{"deep": 1}', "deep must be true or false."),
        (b'{"count": true}', "count must be a whole number."),
        (b'{"count": 1.5}', "count must be a whole number."),
        (b'{"size": true}', "size must be a number."),
        (b'{"graph": []}', "graph must be an object."),
        (b'{"level": "' + b"x" * (17 << 20) + b'"}', "at most 16 MB"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_any_other_body_gets_a_sentence(host, body, sentence) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        read(host, body)


@given(st.binary(max_size=60))
def test_no_body_does_worse_than_a_sentence(host, body) -> None:
    try:
        assert read(host, body).keys() <= KNOWN.keys()
    except ValueError as error:
        assert str(error).endswith(".")
