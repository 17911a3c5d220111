"""Qwen-Image's forward pass written out once more, with the references' keys and values in hand.

Nothing is left out here: whoever gives keys and values has them put in the place of those that are
computed. What the pack does by leaving tokens out has to come to the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each block


def _places(method: str, references: list[Tensor]) -> list[dict[str, int]]:
    """Where each reference lies beside the picture, as the methods say."""
    if method in ("index", "index_timestep_zero"):
        return [{"index": i + 1} for i in range(len(references))]
    if method == "negative_index":
        return [{"index": -i - 1} for i in range(len(references))]
    found, height, width = [], 0, 0
    for reference in references:
        rows, columns = reference.shape[-2:]
        right = rows + height > columns + width
        found.append({"index": 1, "h_offset": 0 if right else height})
        found[-1]["w_offset"] = width if right else 0
        height = max(height, rows + found[-1]["h_offset"])
        width = max(width, columns + found[-1]["w_offset"])
    return found


def _rotate(x: Tensor, pe: Tensor) -> Tensor:
    """(batch, heads, tokens, width of a head); pairs of numbers turned by their angles."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.einsum("bhtnj,btnij->bhtni", pairs, pe.squeeze(1)).flatten(-2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def forward(
    model: Any, call: dict[str, Any], known: Pairs | None = None, causal: bool = False
) -> tuple[Tensor, Pairs]:
    """The prediction, and the references' keys and values after RoPE, block by block."""
    x, references = call["x"], call["ref_latents"]
    method = call.get("ref_latents_method", model.default_ref_method)
    places = _places(method, references)
    image, ids, shape = model.process_img(x)
    parts = [model.process_img(r, **p) for r, p in zip(references, places, strict=True)]
    count = image.shape[1]
    image = model.img_in(torch.cat([image, *(part[0] for part in parts)], dim=1))
    ids = torch.cat([ids, *(part[1] for part in parts)], dim=1)
    text = model.txt_in(model.txt_norm(call["context"]))
    length, rest = text.shape[1], image.shape[1] - count
    start = round(max(((side + 1) // 2) // 2 for side in x.shape[-2:]))
    text_ids = torch.arange(start, start + length).reshape(1, -1, 1).expand(len(x), -1, 3)
    pe = model.pe_embedder(torch.cat([text_ids, ids], dim=1))
    time = call["timestep"]
    now = model.time_text_embed(time, image)
    zero = model.time_text_embed(time * 0, image) if method.endswith("zero") else now
    each = torch.cat([now[:, None].expand(-1, count, -1), zero[:, None].expand(-1, rest, -1)], 1)
    main = length + count
    bias = torch.zeros(len(x), 1, main + rest, main + rest)
    if (mask := call.get("attention_mask")) is not None:
        bias[:, 0, :, :length].masked_fill_(mask[:, None] == 0, -torch.inf)
    if causal:
        bias[:, :, main:] = -torch.inf
        first = main
        for part, _, _ in parts:  # each sees itself alone
            last = first + part.shape[1]
            bias[:, :, first:last, first:last] = 0.0
            first = last
    pairs: Pairs = []
    for index, block in enumerate(model.transformer_blocks):
        given = None if known is None else known[index]
        image, text, pair = _block(block, image, text, each, now, pe, bias, main, given)
        pairs.append(pair)
    out = model.proj_out(model.norm_out(image, now))[:, :count]
    out = out.view(shape[0], shape[2], shape[3] // 2, shape[4] // 2, shape[1], 2, 2)
    out = out.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape)
    return out[..., : x.shape[-2], : x.shape[-1]], pairs


def _block(
    block: Any,
    image: Tensor,
    text: Tensor,
    each: Tensor,
    now: Tensor,
    pe: Tensor,
    bias: Tensor,
    main: int,
    known: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    attn, length = block.attn, text.shape[1]
    shift, scale, gate, shift2, scale2, gate2 = block.img_mod(each).chunk(6, -1)
    t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = block.txt_mod(now)[:, None].chunk(6, -1)
    own = block.img_norm1(image) * (1 + scale) + shift
    words = block.txt_norm1(text) * (1 + t_scale) + t_shift

    def joint(to_text: Any, to_image: Any) -> Tensor:
        return torch.cat([_heads(to_text(words), attn.heads), _heads(to_image(own), attn.heads)], 2)

    query, key = joint(attn.add_q_proj, attn.to_q), joint(attn.add_k_proj, attn.to_k)
    value = joint(attn.add_v_proj, attn.to_v)
    query = torch.cat(
        [attn.norm_added_q(query[:, :, :length]), attn.norm_q(query[:, :, length:])], 2
    )
    key = torch.cat([attn.norm_added_k(key[:, :, :length]), attn.norm_k(key[:, :, length:])], 2)
    query, key = _rotate(query, pe), _rotate(key, pe)
    pair = key[:, :, main:].clone(), value[:, :, main:].clone()
    if known is not None:
        key = torch.cat([key[:, :, :main], known[0]], 2)
        value = torch.cat([value[:, :, :main], known[1]], 2)
    out = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    image = image + gate * attn.to_out[0](out[:, length:])
    text = text + t_gate * attn.to_add_out(out[:, :length])
    image = image + gate2 * block.img_mlp(block.img_norm2(image) * (1 + scale2) + shift2)
    text = text + t_gate2 * block.txt_mlp(block.txt_norm2(text) * (1 + t_scale2) + t_shift2)
    return image, text, pair
