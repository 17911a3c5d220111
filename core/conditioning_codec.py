"""Conditioning to bytes and back, exactly: one safetensors file per entry, never pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

VERSION = 1
MAX_DEPTH = 32

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


class Unstorable(ValueError):
    """A value that cannot be kept exactly; the message says which part and why."""


class Corrupt(ValueError):
    """Bytes that are not an entry, or not the entry that was written."""


class FutureVersion(ValueError):
    """An entry in a format that this version of the pack does not know yet."""


@dataclass(frozen=True)
class Entry:
    """A stored value, what it cost (seconds), what it came from (digests by part), and where."""

    value: Any
    seconds: float
    parts: dict[str, str]
    device: str


def flatten(value: Any, tensors: list[torch.Tensor], where: str = "value", depth: int = 0) -> Any:
    """Describe `value` in JSON; its tensors are copied to the CPU and appended to `tensors`."""
    if depth > MAX_DEPTH:
        raise Unstorable(f"{where} is nested deeper than {MAX_DEPTH} levels")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return ["float", struct.pack(">d", value).hex()]
    if kind in (list, tuple):
        items = [flatten(v, tensors, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        return [kind.__name__, items]
    if kind is dict:
        return ["dict", [_flatten_item(k, v, tensors, where, depth) for k, v in value.items()]]
    if kind is torch.Tensor:
        return _flatten_tensor(value, tensors, where)
    raise Unstorable(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def _flatten_item(key: Any, value: Any, tensors: list[torch.Tensor], where: str, depth: int) -> Any:
    if type(key) not in (str, int):
        raise Unstorable(f"{where} has a key of type {type(key).__name__}")
    return [key, flatten(value, tensors, f"{where}[{key!r}]", depth + 1)]


def _flatten_tensor(value: torch.Tensor, tensors: list[torch.Tensor], where: str) -> Any:
    if value.layout is not torch.strided or value.is_quantized or str(value.dtype) not in _DTYPES:
        raise Unstorable(f"{where} is a tensor of {value.dtype}, {value.layout}")
    if value.is_meta:
        raise Unstorable(f"{where} is a tensor without data")
    tensors.append(value.detach().to("cpu", copy=True).contiguous())
    return ["tensor", len(tensors) - 1, str(value.dtype), list(value.shape), str(value.device)]


def rebuild(tree: Any, tensors: list[torch.Tensor], depth: int = 0) -> Any:
    """The inverse of `flatten`: fresh lists, dicts and tensors, on the devices they came from."""
    if depth > MAX_DEPTH:
        raise Corrupt("nested too deep")
    if tree is None or type(tree) in (bool, int, str):
        return tree
    kind, content, *rest = tree
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if kind == "list":
        return [rebuild(item, tensors, depth + 1) for item in content]
    if kind == "tuple":
        return tuple(rebuild(item, tensors, depth + 1) for item in content)
    if kind == "dict":
        return {key: rebuild(item, tensors, depth + 1) for key, item in content}
    if kind == "tensor":
        dtype, shape, device = rest
        tensor = tensors[content]
        if tensor.dtype != _DTYPES[dtype] or list(tensor.shape) != shape:
            raise Corrupt("a tensor has another type or shape than its description")
        return tensor.to(device, copy=True)
    raise Corrupt(f"unknown kind {kind!r}")


def encode(entry: Entry) -> bytes:
    """One entry as the bytes of a safetensors file. Raises Unstorable."""
    tensors: list[torch.Tensor] = []
    tree = flatten(entry.value, tensors)
    facts = {"seconds": entry.seconds, "parts": entry.parts, "device": entry.device}
    body = json.dumps({"tree": tree, **facts})
    metadata = {"format": "qwen_vram.conditioning", "version": str(VERSION), "entry": body}
    metadata["digest"] = _digest(body, tensors)
    return save_tensors({str(i): tensor for i, tensor in enumerate(tensors)}, metadata)


def decode(data: bytes) -> Entry:
    """The inverse of `encode`. Raises Corrupt, FutureVersion; never believes an altered byte."""
    metadata = read_metadata(data)
    try:
        named = load_tensors(data)
        tensors = [named[str(i)] for i in range(len(named))]
        if _digest(metadata["entry"], tensors) != metadata["digest"]:
            raise Corrupt("the content does not match its digest")
        body = json.loads(metadata["entry"])
        value = rebuild(body["tree"], tensors)
        return Entry(value, body["seconds"], body["parts"], body["device"])
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise error if isinstance(error, Corrupt) else Corrupt(str(error)) from error


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of an entry from (at least) the beginning of its file."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > len(data) - 8:
            raise ValueError("the header is cut off")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        if metadata["format"] != "qwen_vram.conditioning":
            raise ValueError("it is another kind of file")
        version = int(metadata["version"])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"no readable header ({error})") from error
    if version > VERSION:
        raise FutureVersion(f"format {version}; this version of Qwen VRAM reads up to {VERSION}")
    return metadata


def _digest(body: str, tensors: list[torch.Tensor]) -> str:
    digest = hashlib.blake2b(body.encode(), digest_size=32)
    for tensor in tensors:
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
