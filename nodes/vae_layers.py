"""What a VAE consists of: the layers of Wan 2.1's, and whether they are as known."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import comfy.ldm.modules.diffusionmodules.model as diffusion
import comfy.ldm.wan.vae as wan
import comfy.ops
import comfy.sd
from comfy import model_management
from torch import Tensor, nn

from ..core.units import size_text
from ..core.vae_attention import Attend, attend_by_products, whole_layer
from ..core.vae_plan import Network
from ..core.vae_tiles import steps_of

WHOLE, BY_TILES = "whole", "tiles"
CHAIN = {wan.CausalConv3d, wan.ResidualBlock, wan.Resample, wan.RMS_norm, nn.SiLU}
KNOWN = CHAIN | {wan.WanVAE, wan.Encoder3d, wan.Decoder3d, wan.AttentionBlock, wan.ops.Conv2d}
KNOWN |= {nn.Sequential, nn.Identity, nn.Dropout, nn.Upsample, nn.ZeroPad2d}
ATTENTIONS = {
    diffusion.pytorch_attention,
    diffusion.xformers_attention,
    diffusion.normal_attention,
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Layers(NamedTuple):
    """One direction of Wan 2.1's VAE, its layers in their order, and the channels that it keeps."""

    before: list[nn.Module]
    attention: nn.Module
    after: list[nn.Module]
    channels: int

    @classmethod
    def decoding(cls, vae: comfy.sd.VAE) -> Layers:
        """From latents to pixels."""
        model = vae.first_stage_model
        first, attention, last = model.decoder.middle
        before = [model.conv2, model.decoder.conv1, first]
        after = [last, *model.decoder.upsamples, *model.decoder.head]
        return cls(before, attention, after, vae.conv_out_channels)

    @classmethod
    def encoding(cls, vae: comfy.sd.VAE) -> Layers:
        """From pixels to the mean of the latents; the last layer adds channels of the variance."""
        model = vae.first_stage_model
        first, attention, last = model.encoder.middle
        before = [model.encoder.conv1, *model.encoder.downsamples, first]
        after = [last, *model.encoder.head, model.conv1]
        return cls(before, attention, after, vae.latent_channels)

    @property
    def fused(self) -> bool:
        """Whether the attention makes no table of scores."""
        return self.attention.optimized_attention is not diffusion.normal_attention

    @property
    def attend(self) -> Attend:
        """What does the attention in slices."""
        return comfy.ops.scaled_dot_product_attention if self.fused else attend_by_products

    def attended(self, x: Tensor) -> Tensor:
        """The attention's layer over whole pictures, as ComfyUI does it, but failures arrive."""
        if self.attention.optimized_attention is not diffusion.pytorch_attention:
            return self.attention(x)
        return whole_layer(self.attention, comfy.ops.scaled_dot_product_attention, x)

    def whole(self, x: Tensor) -> Tensor:
        """All of it over whole pictures: what WanVAE.decode and WanVAE.encode compute."""
        for layer in self.before:
            x = layer(x)
        x = self.attended(x)
        for layer in self.after:
            x = layer(x)
        return x[:, : self.channels]

    def network(self, vae: comfy.sd.VAE, pictures: int = 1) -> Network:
        """What a plan needs to know of `pictures` that go at once."""
        steps = (tuple(map(steps_of, part)) for part in (self.before, self.after))
        element_size = model_management.dtype_size(vae.vae_dtype) * pictures
        kind = vae.device.type
        return Network(*steps, element_size, self.fused, kind in ("cpu", "mps"), kind == "cpu")


class Outcome(NamedTuple):
    """What was done, for the node. `tile_px`: width and height of the largest planned tile.

    `apart`: the limit made fewer pictures go at once than ComfyUI would have taken.
    """

    how: str
    predicted_bytes: int
    tiles: int = 1
    tile_px: tuple[int, int] = (0, 0)
    slices: int = 1
    in_ram: bool = False
    failures: int = 0
    apart: bool = False

    def text(self) -> str:
        """One line. Exact is only what ComfyUI's layers made of whole pictures, as many at once."""
        peak = size_text(self.predicted_bytes)
        line = f"whole picture at once, peak {peak} predicted; "
        if self.how != WHOLE:
            width, height = self.tile_px
            line = f"{self.tiles} tiles of {width}x{height} px, peak {peak} predicted; "
        line += "exact" if self.how == WHOLE and not self.apart else "exact up to rounding"
        if self.slices > 1:
            line += f"; attention in {self.slices} slices"
        if self.in_ram:
            line += "; pictures between them in RAM"
        if self.failures:
            line += f"; out of memory {times(self.failures)}, "
            line += "went on again" if self.how == WHOLE else "went on smaller"
        return line


def times(count: int) -> str:
    """As a sentence says it."""
    return "once" if count == 1 else f"{count} times"


def why_unknown(vae: Any) -> str:
    """Why this VAE goes ComfyUI's own way; nothing if it is one whose parts are known."""
    if type(vae) is not comfy.sd.VAE:
        return f"{type(vae).__name__} is not ComfyUI's kind of VAE"
    model = vae.first_stage_model
    if type(model) is not wan.WanVAE:
        return f"{type(model).__name__} is not the VAE of Qwen-Image and Wan 2.1"
    if others := {type(part) for part in model.modules()} - KNOWN:
        return f"it has other layers: {', '.join(sorted(kind.__name__ for kind in others))}"
    for coder in (model.decoder, model.encoder):
        if len(coder.middle) != 3:
            return f"its middle has {len(coder.middle)} layers"
        first, attention, last = coder.middle
        chain = coder.upsamples if coder is model.decoder else coder.downsamples
        if {type(layer) for layer in (coder.conv1, first, last, *chain, *coder.head)} - CHAIN:
            return "its layers are in another order"
        if type(attention) is not wan.AttentionBlock:
            return "its layers are in another order"
    return _why_changed(vae)


def _why_changed(vae: comfy.sd.VAE) -> str:
    """What another node has changed in a VAE whose layers are known; nothing if nothing."""
    if vae.patcher.object_patches:
        return f"another node has replaced its {min(vae.patcher.object_patches)}"
    if replaced := _replaced(vae):
        return f"another node has replaced its {replaced}"
    for name, part in vae.first_stage_model.named_modules():
        place = name or "model"
        if replaced := _replaced(part):
            return f"another node has replaced {replaced} of its {place}"
        if any(getattr(part, kind) for kind in HOOKS):
            return f"another node has put a hook on its {place}"
        if getattr(part, "padding_mode", "zeros") != "zeros":
            return f"the padding of its {place} is {part.padding_mode}"
        if type(part) is wan.AttentionBlock and part.optimized_attention not in ATTENTIONS:
            return f"another node has replaced the attention of its {place}"
    return ""


def _replaced(thing: object) -> str:
    """A method that was replaced on this very object; nothing if none."""
    own = vars(thing).keys() & _methods(type(thing))
    return min(own, default="")


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Names of what can be called on objects of a class."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))
