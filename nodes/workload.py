"""What a forward pass is, and what memory its device has: the numbers that core.budget works on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ..core import measured
from ..core.budget import Memory, Plan, Work
from . import loaded_models, unmerged_patcher
from .quantized_layouts import FOUR_BIT_LAYOUT, INT8_LAYOUT
from .recovery import is_used

MODULATION = "_mod."  # in the names of layers that see one row for each item, or for each timestep
LATENT_COPIES = 8  # x, noise, both outputs with their weights, and what samplers keep


class Holding(Protocol):
    """What another patch of this pack keeps on the GPU and can let go of."""

    def bytes_held(self) -> int:
        """How much."""

    def release(self) -> None:
        """Let go of it."""


def work_of(
    model: BaseModel,
    sliced: bool,
    x: torch.Tensor,
    text: torch.Tensor | None,
    more: dict[str, Any],
    together: int = 1,
) -> Work:
    """One forward pass. `x` is (B, C, ..., h, w), `text` (B, tokens, width), `more` the kwargs of
    apply_model; of a model that cannot be `sliced` only what ComfyUI thinks it needs is known.
    `together`: items that have to stay in one call where a batch runs apart."""
    fixed = LATENT_COPIES * x.nbytes
    size = comfy.model_management.dtype_size(model.get_dtype_inference())
    if not sliced:
        estimate = round(_host_estimate(model, x, more))
        numbers = (x.shape[0], tokens_of(x), 0, 0, 0, 1, 0, size, fixed, estimate)
        return Work(*numbers, together=together)
    inner = model.diffusion_model
    references = sum(tokens_of(latent) for latent in more.get("ref_latents") or ())
    words = text.shape[1] if text is not None else 0
    heads = inner.transformer_blocks[0].attn.heads
    blocks = len(inner.transformer_blocks)
    method = more.get("ref_latents_method", inner.default_ref_method)
    return Work(
        batch=x.shape[0],
        tokens=tokens_of(x),
        reference_tokens=references,
        text_tokens=words,
        width=inner.inner_dim,
        heads=heads,
        blocks=blocks,
        element_size=size,
        fixed=fixed,
        timestep_zero=references > 0 and method == "index_timestep_zero",
        aspect=max(x.shape[-2:]) / min(x.shape[-2:]),
        together=together,
    )


class Dequantized(NamedTuple):
    """Bytes of the largest weight of a model that is dequantised for a product, and let go of."""

    one_row: int = 0  # where modulations multiply a single row
    rows: int = 0  # where they multiply more

    def of(self, work: Work) -> int:
        """The one that a forward pass makes. References at timestep zero have their own row."""
        return self.rows if work.batch > 1 or work.timestep_zero else self.one_row


def dequantized_of(model: BaseModel, device: torch.device) -> Dequantized:
    """What products of this model's quantised layers take beside the activations."""
    size = comfy.model_management.dtype_size(model.get_dtype_inference())
    found = [Dequantized()]
    for name, layer in model.diffusion_model.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, QuantizedTensor) or weight.dim() != 2:
            continue
        taken = weight.numel() * size
        one_row = taken if _is_dequantized(layer, 1 if MODULATION in name else 2, device) else 0
        found.append(Dequantized(one_row, taken if _is_dequantized(layer, 2, device) else 0))
    return Dequantized(*map(max, zip(*found, strict=True)))


def _is_dequantized(layer: torch.nn.Module, rows: int, device: torch.device) -> bool:
    """Whether a product of so many rows needs the plain weight. The host's formats do not where
    it has kernels for them, unless it computes in full precision or patches the weight; what they
    take where it has none, as on AMD or with CUDA 12, is not counted."""
    layout = layer.weight._layout_cls
    if getattr(layer, "weight_function", None) or layout == INT8_LAYOUT:
        return True
    if layout == FOUR_BIT_LAYOUT:
        return rows > 1 or device.type != "cuda"  # bitsandbytes' kernel reads it packed
    full = getattr(layer, "_full_precision_mm", False)
    return bool(full or getattr(layer, "comfy_force_cast_weights", False))


def tokens_of(latent: torch.Tensor) -> int:
    """Tokens of one item of a latent (B, C, ..., h, w): patches of 2 x 2. Sound, meshes and latents
    packed into one, (B, C, n), have as many as numbers in a channel."""
    if latent.ndim < 4:
        return math.prod(latent.shape[2:])
    *frames, height, width = latent.shape[2:]
    return math.prod(frames) * math.ceil(height / 2) * math.ceil(width / 2)


def _host_estimate(model: BaseModel, x: torch.Tensor, more: dict[str, Any]) -> float:
    """What ComfyUI reserves for such a pass, in bytes."""
    shapes = {}
    for name in model.memory_usage_factor_conds:
        value = more.get(name)
        tensors = value if isinstance(value, list) else [value]
        shapes[name] = [list(tensor.shape) for tensor in tensors if torch.is_tensor(tensor)]
    return model.memory_required(list(x.shape), cond_shapes=shapes)


def memory_of(
    patcher: ModelPatcher, used: Sequence[ModelPatcher], held: Iterable[Holding], cap: int | None
) -> Memory:
    """The memory of a model's device now, without waiting for it; `cap` is what a limit leaves:
    within one, pages of other models do not give way by themselves."""
    device = patcher.load_device
    free = patcher.get_free_memory(device)  # with what dynamic VRAM gives up by itself
    if cap is not None:
        free = min(free, cap)
    free -= unmerged_patcher.bytes_to_come(patcher)  # below 0 where they do not fit, either
    if device.type == "cpu":  # nothing that is unloaded would go anywhere else
        return Memory(int(free), 0, 0, sum(part.bytes_held() for part in held))
    others = sum(
        other.loaded_size()
        for entry, other in loaded_models.loaded()
        if entry.device == device
        and (cap is not None or not other.is_dynamic())
        and not is_used(other, [*used, patcher])
    )
    streamable = 0 if patcher.is_dynamic() else patcher.loaded_size()
    return Memory(int(free), int(others), int(streamable), sum(part.bytes_held() for part in held))


def weights_of(model: BaseModel) -> str:
    """How the matrices of a model are held: formats, and dtypes that it does not compute in.

    What a product takes beside the activations depends on it: a weight is cast, dequantised, or
    read by a kernel. Ways to compute from the same weights (fp8 fast) are not told apart.
    """
    computed, found = model.get_dtype_inference(), set()
    for layer in model.diffusion_model.modules():
        weight = getattr(layer, "weight", None)
        if not torch.is_tensor(weight) or weight.dim() != 2:
            continue
        if (kind := getattr(layer, "quant_format", None)) is not None:
            found.add(str(kind))
            continue
        # With dynamic VRAM the parameter is what the file has; see comfy.model_management.
        held = getattr(layer, "weight_comfy_model_dtype", None) or weight.dtype
        if held != computed:
            found.add(str(held))
    return ", ".join(sorted(found))


def key_of(model: BaseModel, weights: str, device: torch.device, plan: Plan) -> str:
    """Under which name corrections of the predictions are kept; `weights`: of `weights_of`."""
    name = comfy.model_management.get_torch_device_name(device)
    kind = type(getattr(model, "diffusion_model", model)).__name__
    return measured.key_of(kind, str(model.get_dtype_inference()), weights, name, plan)
