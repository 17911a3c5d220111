"""Conditioning to bytes and back, exactly: one safetensors file per entry, never pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

VERSION = 1
MAX_DEPTH = 32
PIECE_BYTES = 1 << 20
HASH_THREADS = 4
MAX_HEADER_BYTES = 4 << 20  # parsed before anything is verified, at up to 20 times its size
MAX_INT_BITS = 4096  # Python reads no longer decimal numbers back

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}

_UNREADABLE = (  # what reading hostile bytes has been seen to raise, in safetensors, JSON and torch
    *(SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(struct.error, RuntimeError, ArithmeticError),
)


class Unstorable(ValueError):
    """A value that cannot be kept exactly; the message says which part and why."""


class Corrupt(ValueError):
    """Bytes that are not an entry, or not the entry that was written."""


class FutureVersion(ValueError):
    """An entry in a format that this version of the pack does not know yet."""


class Elsewhere(ValueError):
    """An intact entry with tensors on a device that this machine lacks, or that is full."""


@dataclass(frozen=True)
class Entry:
    """A stored value, what it cost (seconds), what it came from (digests by part), and where."""

    value: Any
    seconds: float
    parts: dict[str, str]
    device: str


def flatten(value: Any, tensors: list[torch.Tensor], where: str = "value", depth: int = 0) -> Any:
    """Describe `value` in JSON; its tensors are copied to the CPU and appended to `tensors`.

    Texts become tensors of bytes: a file's header, which many programs show, has no prompt in it.
    """
    if depth > MAX_DEPTH:
        raise Unstorable(f"{where} is nested deeper than {MAX_DEPTH} levels")
    kind = type(value)
    if kind is int and value.bit_length() > MAX_INT_BITS:
        raise Unstorable(f"{where} is a number of {value.bit_length()} bits")
    if value is None or kind in (bool, int):
        return value
    if kind is str:
        return _flatten_text(value, tensors) if value else value
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
    if type(key) is int:
        flatten(key, tensors, f"a key of {where}", depth)  # which refuses long ones
    return [key, flatten(value, tensors, f"{where}[{key!r}]", depth + 1)]


def _flatten_text(value: str, tensors: list[torch.Tensor]) -> Any:
    data = bytearray(value.encode("utf-8", "surrogatepass"))
    tensors.append(torch.frombuffer(data, dtype=torch.uint8))
    return ["text", len(tensors) - 1, len(data)]


def _flatten_tensor(value: torch.Tensor, tensors: list[torch.Tensor], where: str) -> Any:
    if value.layout is not torch.strided or value.is_quantized or str(value.dtype) not in _DTYPES:
        raise Unstorable(f"{where} is a tensor of {value.dtype}, {value.layout}")
    if value.is_meta:
        raise Unstorable(f"{where} is a tensor without data")
    tensors.append(value.detach().to("cpu", copy=True).contiguous())
    return ["tensor", len(tensors) - 1, str(value.dtype), list(value.shape), str(value.device)]


def rebuild(tree: Any, tensors: dict[int, torch.Tensor], depth: int = 0) -> Any:
    """The inverse of `flatten`: fresh lists, dicts and tensors, on the devices they came from.

    Takes each tensor out of `tensors`: one that is named twice would be copied twice, and a small
    file could ask for any amount of memory.
    """
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
        return _rebuild_tensor(tensors.pop(content), *rest)
    if kind == "text":
        return _rebuild_text(tensors.pop(content), *rest)
    raise Corrupt(f"unknown kind {kind!r}")


def _rebuild_text(tensor: torch.Tensor, length: int) -> str:
    if tensor.dtype != torch.uint8 or list(tensor.shape) != [length]:
        raise Corrupt("a text has another type or length than its description")
    return tensor.numpy().tobytes().decode("utf-8", "surrogatepass")


def _rebuild_tensor(tensor: torch.Tensor, dtype: str, shape: list[int], device: str) -> Any:
    if tensor.dtype != _DTYPES[dtype] or list(tensor.shape) != shape:
        raise Corrupt("a tensor has another type or shape than its description")
    target = torch.device(device)
    if target.type == "meta":
        raise Corrupt("a tensor without data")
    try:
        return tensor.to(target, copy=True)
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        raise Elsewhere(f"a tensor cannot be placed on {device} ({error})") from error


def encode(entry: Entry) -> bytes:
    """One entry as the bytes of a safetensors file. Raises Unstorable."""
    tensors: list[torch.Tensor] = []
    tree = flatten(entry.value, tensors)
    facts = {"seconds": entry.seconds, "parts": entry.parts, "device": entry.device}
    body = json.dumps({"tree": tree, **facts})
    metadata = {"format": "qwen_vram.conditioning", "version": str(VERSION), "entry": body}
    metadata["digest"] = _digest(body, tensors)
    data = save_tensors({str(i): tensor for i, tensor in enumerate(tensors)}, metadata)
    length = header_bytes(data)
    if length > MAX_HEADER_BYTES:
        raise Unstorable(f"its structure takes {length} bytes, more than {MAX_HEADER_BYTES}")
    return data


def decode(data: bytes) -> Entry:
    """The inverse of `encode`; never believes an altered byte.

    Raises Corrupt, FutureVersion, Elsewhere.
    """
    metadata = read_metadata(data)
    try:
        named = load_tensors(data)
        tensors = [named[str(i)] for i in range(len(named))]
        if _digest(metadata["entry"], tensors) != metadata["digest"]:
            raise Corrupt("the content does not match its digest")
        body = json.loads(metadata["entry"])
        waiting = dict(enumerate(tensors))
        entry = Entry(rebuild(body["tree"], waiting), *_facts(body))
        if waiting:
            raise Corrupt("it holds tensors that it does not name")
        return entry
    except (Corrupt, Elsewhere):
        raise
    except _UNREADABLE as error:
        raise Corrupt(str(error)) from error


def _facts(body: dict[str, Any]) -> tuple[float, dict[str, str], str]:
    seconds, parts, device = body["seconds"], body["parts"], body["device"]
    texts = [device, *parts, *parts.values()]
    if type(seconds) not in (int, float) or not all(type(text) is str for text in texts):
        raise Corrupt("its description is of another kind")
    return seconds, parts, device


def header_bytes(data: bytes) -> int:
    """How long the header says it is, from the first 8 bytes of a file. Raises Corrupt."""
    try:
        return struct.unpack_from("<Q", data)[0]
    except struct.error as error:
        raise Corrupt(f"no readable header ({error})") from error


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of an entry from (at least) the beginning of its file.

    Raises Corrupt, FutureVersion.
    """
    try:
        metadata = _read_header(data)["__metadata__"]
        if metadata["format"] != "qwen_vram.conditioning":
            raise ValueError("it is another kind of file")
        version = int(metadata["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"no readable header ({error})") from error
    if version > VERSION:
        raise FutureVersion(f"format {version}; this version of Qwen VRAM reads up to {VERSION}")
    return metadata


def declared_bytes(data: bytes) -> int:
    """The size of the whole file by its header, which is the beginning `data`. Raises Corrupt."""
    try:
        table = _read_header(data)
        ends = [table[name]["data_offsets"][1] for name in table if name != "__metadata__"]
        return 8 + header_bytes(data) + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Corrupt(f"no readable header ({error})") from error


def _read_header(data: bytes) -> dict[str, Any]:
    length = header_bytes(data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError("the header is cut off")
    table = json.loads(data[8 : 8 + length])
    if type(table) is not dict:
        raise ValueError("the header is no table")
    return table


def _digest(body: str, tensors: list[torch.Tensor]) -> str:
    """Of the description and the digests of all pieces, which large entries compute in threads."""
    pieces = []
    for tensor in tensors:
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        pieces += [data[i : i + PIECE_BYTES] for i in range(0, len(data), PIECE_BYTES)]
    large = len(pieces) > len(tensors)
    parts = _hash_in_threads(pieces) if large else list(map(_hash, pieces))
    return hashlib.blake2b(body.encode() + b"".join(parts), digest_size=32).hexdigest()


def _hash_in_threads(pieces: list[memoryview]) -> list[bytes]:
    """hashlib lets other threads run meanwhile."""
    try:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            return list(pool.map(_hash, pieces))
    except RuntimeError:  # the system allows no more threads, or Python is ending
        return list(map(_hash, pieces))


def _hash(piece: memoryview) -> bytes:
    return hashlib.blake2b(piece, digest_size=32).digest()
