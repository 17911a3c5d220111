"""What a checkpoint is, read from its safetensors header alone: kind, dimensions, size."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from .file_kinds import TEXT_ENCODER as TEXT_ENCODER
from .file_kinds import TEXT_HEAD_DIM, TRANSFORMER, kind_among
from .file_kinds import VAE as VAE
from .file_kinds import transformer_prefix as transformer_prefix
from .shards import shards_of

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")

TOKEN_TABLE = "model.embed_tokens.weight"
VISION_HEAD_DIM = 80
VOCABULARY = 152064  # rows of Qwen2.5-VL's table

GGUF = (
    "a GGUF file, which Qwen VRAM does not open: open it with the loaders of ComfyUI-GGUF, Unet "
    "Loader (GGUF) or CLIPLoader (GGUF), behind which the other nodes of Qwen VRAM work."
)
GGUF_OF_ANY_KIND = f"{GGUF} Neither opens a VAE: take that as a .safetensors file."
GGUF_VAE = (
    "a GGUF file, which Qwen VRAM does not open: take the VAE as a .safetensors file, such as "
    "qwen_image_vae.safetensors."
)
NOT_A_MODEL = "not a model; download the file itself."
MIX_UPS = {  # by the first bytes of a file
    b"GGUF": GGUF_OF_ANY_KIND,
    b"PK": "a PyTorch or zip file under another name; download the safetensors version.",
    b"<": f"a web page, {NOT_A_MODEL}",
    b"version ": f"a Git LFS pointer, {NOT_A_MODEL}",
}


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it, says what it is and what was expected."""


@dataclass(frozen=True)
class Tensor:
    """dtype as safetensors spells it, the shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    # Where its bytes lie: the shard ("" for the header's own file), and from which byte on.
    path: str = field(default="", compare=False)
    start: int = field(default=0, compare=False)
    bytes: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Header:
    """The table of contents of a safetensors file, or of all shards of a model."""

    path: str  # of the first shard
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def shape(self, *names: str) -> tuple[int, ...]:
        """Shape of the first of `names` that the file has."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name].shape
        raise CheckpointError(f"{_name(self.path)} lacks the tensor {names[0]}.")

    def paths(self) -> list[str]:
        """The files that it speaks of."""
        return sorted({tensor.path or self.path for tensor in self.tensors.values()})

    def count(self, prefix: str) -> int:
        """How many numbered blocks follow `prefix`."""
        numbers = {
            key[len(prefix) :].split(".")[0] for key in self.tensors if key.startswith(prefix)
        }
        return sum(number.isdigit() for number in numbers)

    def hints(self) -> dict[str, Any]:
        """Dimensions that weights cannot tell, from the metadata entry `qwen_vram` (JSON)."""
        try:
            hints = json.loads(self.metadata.get("qwen_vram", "{}"))
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{_name(self.path)} has broken qwen_vram metadata: {error}; download the file "
                "again, or write that metadata entry as JSON."
            ) from error
        return hints if isinstance(hints, dict) else {}


def _name(path: str) -> str:
    return os.path.basename(path)


def read_header(path: str) -> Header:
    """Read and check the header; the weights stay on disk. Raises CheckpointError, OSError.

    Of a shard: the headers of all shards as one.
    """
    paths = shards_of(path)
    for shard in paths if len(paths) > 1 else ():
        if not os.path.isfile(shard):
            raise CheckpointError(
                f"{_name(path)} is one of {len(paths)} files of a model, and {_name(shard)} is "
                "not beside it; download that one too."
            )
    headers = [_read_one(shard) for shard in paths]
    tensors = {usual_name(k): t for header in headers for k, t in header.tensors.items()}
    metadata = {k: v for header in reversed(headers) for k, v in header.metadata.items()}
    return Header(paths[0], {k: t for k, t in tensors.items() if k}, metadata)


def usual_name(name: str) -> str:
    """A tensor's name as ComfyUI has it; "" for what its text encoder has no use for.

    Newer versions of transformers put one more word before the parts of Qwen2.5-VL.
    """
    if name.startswith("lm_head."):
        return ""
    for theirs, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def is_gguf(name: object) -> bool:
    """Whether a file is GGUF by its name."""
    return isinstance(name, str) and name.lower().endswith(".gguf")


def _read_one(path: str) -> Header:
    if not path.lower().endswith(SAFETENSORS_SUFFIXES):
        if is_gguf(path):
            raise CheckpointError(f"{_name(path)} is {GGUF}")
        raise CheckpointError(
            f"{_name(path)} is not a .safetensors file; convert it, "
            "or download the safetensors version."
        )
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            _tell_common_mix_ups(path, start)
            raise CheckpointError(
                f"{_name(path)} ({size:,} bytes) is not a safetensors file, "
                "or its beginning is damaged; download it again."
            )
        raw = file.read(length)
    tensors, metadata, end = parse_header(path, raw, length)
    if size < 8 + length + end:
        raise CheckpointError(
            f"{_name(path)} is incomplete: it has {size:,} of {8 + length + end:,} bytes; "
            "download it again."
        )
    return Header(path, tensors, metadata)


def _tell_common_mix_ups(path: str, start: bytes) -> None:
    for mark, sentence in MIX_UPS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{_name(path)} is {sentence}")


def parse_header(
    path: str, raw: bytes, length: int
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Parse the JSON part of a header into tensors, metadata and the end of the data, in bytes."""
    try:
        if len(raw) < length:
            raise ValueError("it ends within its own header")
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        tensors = {name: _tensor(path, 8 + length, t) for name, t in table.items()}
        end = max((t["data_offsets"][1] for t in table.values()), default=0)
        return tensors, {str(k): str(v) for k, v in metadata.items()}, int(end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{_name(path)} is not a readable safetensors file ({error}); download it again."
        ) from error


def _tensor(path: str, base: int, row: dict[str, Any]) -> Tensor:
    start, end = row["data_offsets"]
    return Tensor(row["dtype"], tuple(row["shape"]), path, base + start, end - start)


def kind_of(header: Header) -> str:
    """Say in words what the file is, by the names and shapes of its tensors."""
    return kind_among(header.tensors).what


def require(header: Header, expected: str) -> None:
    """Raise CheckpointError unless the file is of the `expected` kind (TRANSFORMER, TEXT_ENCODER
    or VAE): one sentence that says what it is and what to do with it."""
    kind = kind_among(header.tensors)
    if kind.what != expected:
        raise CheckpointError(
            f"{_name(header.path)} is {kind.what}, and this node needs {expected}: {kind.remedy}."
        )


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head between time, height and width as Qwen-Image does: (16, 56, 56) of 128."""
    time = max(2, head_dim // 16 * 2)
    side, rest = divmod(head_dim - time, 2)
    if side % 2:
        time, side = time + 2, side - 1
    if rest or side < 2:
        raise CheckpointError(
            f"A head of {head_dim} channels cannot be split into three even axes."
        )
    return time, side, side


def transformer_config(header: Header) -> dict[str, Any]:
    """Constructor arguments of the host's QwenImageTransformer2DModel that depend on its width."""
    prefix = transformer_prefix(header.tensors)
    if prefix is None:
        raise CheckpointError(f"{_name(header.path)} is {kind_of(header)}; expected {TRANSFORMER}.")
    head_dim = header.shape(f"{prefix}transformer_blocks.0.attn.norm_q.weight")[0]
    inner = header.shape(f"{prefix}img_in.bias", f"{prefix}img_in.weight")[0]
    axes = header.hints().get("axes_dims_rope") or rope_axes(head_dim)
    return {
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": header.shape(f"{prefix}txt_norm.weight")[0],
        "axes_dims_rope": tuple(axes),
    }


def text_encoder_config(header: Header) -> dict[str, Any]:
    """Dimensions of a Qwen2.5-VL language model and, under "vision", of its vision tower."""
    layer = "model.layers.0."
    vocabulary, hidden = _token_table(header)
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _outputs(header, f"{layer}mlp.gate_proj.weight", hidden),
        "num_hidden_layers": header.count("model.layers."),
        "num_attention_heads": header.shape(f"{layer}self_attn.q_proj.bias")[0] // TEXT_HEAD_DIM,
        "num_key_value_heads": header.shape(f"{layer}self_attn.k_proj.bias")[0] // TEXT_HEAD_DIM,
    }
    if header.count("visual.blocks."):
        config["vision"] = _vision_config(header)
    return config


def _outputs(header: Header, weight: str, inputs: int) -> int:
    """Rows of a weight; bitsandbytes packs two 4-bit weights into a byte and drops the shape."""
    shape = header.shape(weight)
    return 2 * shape[0] // inputs if shape[1:] == (1,) else shape[0]


def _token_table(header: Header) -> tuple[int, ...]:
    """The shape of the vocabulary, whether the file has it or says how to compute it."""
    if TOKEN_TABLE in header.tensors:
        return header.shape(TOKEN_TABLE)
    name, vocabulary = _name(header.path), header.hints().get("vocabulary")
    if vocabulary is None:
        raise CheckpointError(
            f"{name} lacks the vocabulary {TOKEN_TABLE}; download the complete file, or, if it was "
            'trained on computed codes, put {"vocabulary": "sign_codes"} into its metadata entry '
            '"qwen_vram".'
        )
    if vocabulary != "sign_codes":
        raise CheckpointError(
            f"{name} asks for the vocabulary {json.dumps(vocabulary)}, and only "
            f'"sign_codes" is known; update this pack, or use a file with {TOKEN_TABLE}.'
        )
    return VOCABULARY, header.shape("model.norm.weight")[0]


def _vision_config(header: Header) -> dict[str, int]:
    hidden = header.shape("visual.patch_embed.proj.weight")[0]
    heads = header.hints().get("vision_heads", hidden // VISION_HEAD_DIM)
    if not heads or hidden % heads:
        raise CheckpointError(
            f"The number of attention heads of the vision tower of {_name(header.path)} cannot be "
            f'told from its width {hidden}; put {{"vision_heads": N}} into its metadata entry '
            '"qwen_vram".'
        )
    block = "visual.blocks.0.mlp.gate_proj."
    return {
        "hidden_size": hidden,
        "intermediate_size": header.shape(f"{block}bias", f"{block}weight")[0],
        "num_heads": heads,
        "num_layers": header.count("visual.blocks."),
    }
