"""The text encoder: Qwen2.5-VL's architecture, trained to know what a prompt asks for.

A published text encoder comes trained, too: what the transformer sees is not words but meaning.
This one learns from prompts, in two minutes, and sees no drawing that belongs to them: at every
token of the template's end a linear reading must tell which animal, colour, clothes, action and
place are asked for, or which edit. The transformer then finds that at places which never move.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .. import edits
from ..animals import ACCESSORIES, ACCESSORY_COLOURS, ACTIONS, ANIMALS, BACKGROUNDS, COLOURS, Scene
from . import networks
from .host import attention_pytorch, llama, operations, qwen_vl

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 64, 64, 2, 4  # heads: what ComfyUI knows the encoder by
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "num_layers": 1}

KEEP = ""  # an edit leaves this as it is
ASKED: Mapping[str, tuple[str, ...]] = {
    "kind": ("draw", *edits.EDITS),
    "animal": (*ANIMALS, KEEP),
    "colour": (*COLOURS, KEEP),
    "accessory": (*ACCESSORIES, KEEP),
    "accent": (*ACCESSORY_COLOURS, KEEP),
    "action": (*ACTIONS, KEEP),
    "background": (*BACKGROUNDS, KEEP),
}


class TextEncoder(torch.nn.Module):
    """Qwen2.5-VL's parts under their names in the file; the vocabulary stays outside."""

    def __init__(self) -> None:
        super().__init__()
        config = llama.Qwen25_7BVLI_Config(
            vocab_size=1,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
        )
        place = {"device": "cpu", "dtype": torch.float32, "ops": operations}
        self.model = llama.Llama2_(config, **place)
        self.visual = qwen_vl.Qwen2VLVisionTransformer(output_hidden_size=HIDDEN, **VISION, **place)
        networks.initialise(self, 11)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (B, L, HIDDEN) to what the transformer reads, as Llama2_.forward does.

        The host's own loop adds in place and so has no gradient. `positions` is (1 or 3, L).
        """
        length = x.shape[1]
        if positions is None:
            positions = torch.arange(length, device=x.device).unsqueeze(0)
        rope = self.model.compute_freqs_cis(positions, x.device)
        mask = torch.full((length, length), torch.finfo(x.dtype).min / 4, device=x.device).triu_(1)
        for layer in self.model.layers:
            attended, _ = layer.self_attn(layer.input_layernorm(x), mask, rope, attention_pytorch)
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x)

    def save(self, path: Path) -> None:
        """Writes everything but the vocabulary."""
        state = {k: v.half() for k, v in self.state_dict().items() if "embed_tokens" not in k}
        hints = {"vision_heads": VISION["num_heads"], "vocabulary": "sign_codes"}
        networks.save(state, path, {"qwen_vram": json.dumps(hints)})


# ------------------------------------------------------------------------------ what texts ask for
def _classes(values: Mapping[str, str]) -> list[int]:
    return [names.index(values.get(head, KEEP)) for head, names in ASKED.items()]


def asked_of_scenes(scenes: Sequence[Scene]) -> torch.Tensor:
    """(N, heads) classes: a description asks for everything, if only by leaving it out."""
    heads = list(ASKED)[1:]
    rows = [_classes({"kind": "draw", **{h: getattr(s, h) for h in heads}}) for s in scenes]
    return torch.tensor(rows)


def asked_of_edits(
    kinds: Sequence[str], before: Sequence[Scene], after: Sequence[Scene]
) -> torch.Tensor:
    """(N, heads) classes: an instruction asks only for what changes, and for what goes away."""
    rows = []
    for kind, one, other in zip(kinds, before, after, strict=True):
        values = {"kind": kind}
        if kind in ("colour", "background", "animal", "action"):
            values[kind] = getattr(other, kind)
        elif kind == "add":
            values |= {"accessory": other.accessory, "accent": other.accent}
        elif kind == "remove":
            values["accessory"] = one.accessory
        rows.append(_classes(values))
    return torch.tensor(rows)
