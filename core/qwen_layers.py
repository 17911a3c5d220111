"""The linear layers of the published models by name: Qwen-Image's transformer, Qwen2.5-VL 7B."""

from __future__ import annotations

from functools import cache

from . import checkpoint

BLOCKS, WIDTH, MLP, LATENT = 60, 3072, 12288, 64  # Qwen-Image 2512, Edit 2509 and 2511
TEXT_LAYERS, TEXT_WIDTH, TEXT_MLP, TEXT_KEYS = 28, 3584, 18944, 512
VISION_BLOCKS, VISION_WIDTH, VISION_MLP = 32, 1280, 3420
TOKEN_TABLE = checkpoint.TOKEN_TABLE.removesuffix(".weight")  # which can be held in int8 too
TIME_TABLE = "time_text_embed.addition_t_embedding"  # of Qwen-Image-Layered, a table too

Shapes = dict[str, tuple[int, int]]


@cache
def published() -> dict[str, Shapes]:
    """By kind (core.quantization.KINDS), each layer's name and the shape (out, in) of its weight.

    The text encoder's token table is among them.
    """
    return {"diffusion_models": _transformer(), "text_encoders": _text_encoder()}


def _transformer() -> Shapes:
    block = {
        "img_mod.1": (6 * WIDTH, WIDTH),
        "txt_mod.1": (6 * WIDTH, WIDTH),
        **{f"attn.to_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "out.0", "add_out")},
        **{f"attn.add_{x}_proj": (WIDTH, WIDTH) for x in "qkv"},
        **{f"{stream}_mlp.net.0.proj": (MLP, WIDTH) for stream in ("img", "txt")},
        **{f"{stream}_mlp.net.2": (WIDTH, MLP) for stream in ("img", "txt")},
    }
    return {
        "img_in": (WIDTH, LATENT),
        "txt_in": (WIDTH, TEXT_WIDTH),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        **_repeated("transformer_blocks", BLOCKS, block),
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (LATENT, WIDTH),
    }


def _text_encoder() -> Shapes:
    layer = {
        **{f"self_attn.{x}_proj": (TEXT_WIDTH, TEXT_WIDTH) for x in "qo"},
        **{f"self_attn.{x}_proj": (TEXT_KEYS, TEXT_WIDTH) for x in "kv"},
        **{f"mlp.{x}_proj": (TEXT_MLP, TEXT_WIDTH) for x in ("gate", "up")},
        "mlp.down_proj": (TEXT_WIDTH, TEXT_MLP),
    }
    block = {
        "attn.qkv": (3 * VISION_WIDTH, VISION_WIDTH),
        "attn.proj": (VISION_WIDTH, VISION_WIDTH),
        **{f"mlp.{x}_proj": (VISION_MLP, VISION_WIDTH) for x in ("gate", "up")},
        "mlp.down_proj": (VISION_WIDTH, VISION_MLP),
    }
    return {
        TOKEN_TABLE: (checkpoint.VOCABULARY, TEXT_WIDTH),
        **_repeated("model.layers", TEXT_LAYERS, layer),
        **_repeated("visual.blocks", VISION_BLOCKS, block),
        "visual.merger.mlp.0": (4 * VISION_WIDTH, 4 * VISION_WIDTH),
        "visual.merger.mlp.2": (TEXT_WIDTH, 4 * VISION_WIDTH),
    }


def _repeated(prefix: str, count: int, layers: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": s for i in range(count) for name, s in layers.items()}
