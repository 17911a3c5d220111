"""What every route of the pack asks of a request before it does anything for it."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any, NoReturn

from aiohttp import web

MOST_BYTES = 16 << 20  # a large workflow has one or two MB
_PORTS = {"http": 80, "https": 443}
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_KINDS |= {list: "a list", dict: "an object"}


def refused(request: web.Request) -> web.Response | None:
    """A 403 for a request that a page of another origin had its browser send, else None.

    ComfyUI's own origin_only_middleware does not run under --enable-cors-header, and compares only
    on loopback addresses. What browsers say is believed, since a page cannot change these headers;
    a script, which sends none of them, is let in.
    """
    headers = request.headers
    foreign = any(
        site not in ("same-origin", "none") for site in headers.getall("Sec-Fetch-Site", [])
    )
    # A GET says no origin, and a page may have its browser leave out where it came from; then, over
    # plain HTTP, nothing tells it from a script. So what has effects must not be a GET.
    claimed = headers.getall("Origin", []) or headers.getall("Referer", [])
    if not foreign and all(_same(origin, headers.get("Host", "")) for origin in claimed):
        return None
    sentence = (
        "This request comes from a page of another origin, and only ComfyUI's own pages may send "
        "it. If a proxy stands before ComfyUI, let it pass on the header Host, with the port."
    )
    return refusal(403, "other_origin", sentence)


def refusal(status: int, code: str, sentence: str) -> web.Response:
    """A sentence for people, and the name under which a page finds it in the user's language."""
    return web.json_response({"error": sentence, "code": code}, status=status)


def _same(origin: str, host: str) -> bool:
    """Whether the origin, or the address of a page, is at this host and port."""
    try:
        page, own = urllib.parse.urlsplit(origin), urllib.parse.urlsplit(f"//{host}")
        usual = _PORTS.get(page.scheme)
        ports = page.port or usual, own.port or usual
    except ValueError:  # a port that is no number, brackets that do not match
        return False
    return bool(usual and page.hostname == own.hostname and own.hostname and ports[0] == ports[1])


async def json_body(request: web.Request, known: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in the body, with no fields but `known` ones, each of its type.

    A whole number is a float too. Raises ValueError with a sentence that says what is wrong.
    """
    try:
        body = json.loads(await _read(request), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, _TooLarge):
            raise
        raise ValueError(f"The body is not JSON ({error}).") from None
    if not isinstance(body, dict):
        raise ValueError('The body must be a JSON object, such as {"name": "value"}.')
    for name, value in body.items():
        if name not in known:
            raise ValueError(f"{name[:80]} is not known: use {', '.join(known) or 'no fields'}.")
        kind = known[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} must be {_KINDS.get(kind, kind.__name__)}.")
    return body


class _TooLarge(ValueError):
    """More than anybody needs."""


async def _read(request: web.Request) -> bytes:
    """The body, as long as it is of a size that makes sense; also when nobody told the size."""
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > MOST_BYTES:
            raise _TooLarge(f"The body must have at most {MOST_BYTES >> 20} MB.")
    return bytes(body)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
