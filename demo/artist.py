"""Draws with the embedded model through ComfyUI's own nodes, in this process and without a server.

For figures that need hundreds of pictures. Models are opened as our loader nodes open them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embedded import TEXT_ENCODER, TRANSFORMER, VAE
from .environment import ROOT

Options = Callable[[], dict[str, Any]]
SHIFT = 3.1  # of ModelSamplingAuraFlow, as the official workflows set it


@dataclass(frozen=True)
class Settings:
    """Of the sampler; the defaults are what the embedded model is judged with."""

    steps: int = 8
    cfg: float = 2.0
    seed: int = 0
    sampler: str = "euler"
    scheduler: str = "simple"

    def with_seed(self, seed: int) -> Settings:
        """The same with other noise."""
        return replace(self, seed=seed)


def import_comfyui(comfyui: Path, cpu: bool) -> None:
    """Makes ComfyUI's modules importable; its device is settled for good."""
    sys.path.insert(0, str(comfyui))  # before our own folder, which has nodes too
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = True
    args.database_url = "sqlite:///:memory:"
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)


def _architectures() -> Any:
    """nodes/architectures.py of this pack, under a name that does not clash with ComfyUI's."""
    spec = importlib.util.spec_from_file_location(
        "qwen_vram_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None:
        raise ImportError(f"{ROOT} holds no ComfyUI pack.")
    if "qwen_vram_pack" not in sys.modules:  # its layouts are known to ComfyUI by their classes
        sys.modules["qwen_vram_pack"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("qwen_vram_pack.nodes.architectures")


class Artist:
    """The embedded model, ready to draw; call `import_comfyui` first."""

    def __init__(
        self, models: Path, transformer: Options = dict, text_encoder: Options = dict
    ) -> None:
        """The options are those of nodes/architectures.py, asked for once it can be imported."""
        import nodes
        from comfy_extras import nodes_edit_model, nodes_model_advanced, nodes_qwen, nodes_sd3

        pack = _architectures()
        loaded = pack.load_transformer(str(models / TRANSFORMER), transformer())
        sampling = nodes_model_advanced.ModelSamplingAuraFlow()
        self.model = sampling.patch_aura(loaded, SHIFT)[0]
        self.clip = pack.load_text_encoder(str(models / TEXT_ENCODER), text_encoder())
        self.vae = pack.load_vae(str(models / VAE), None, "default")
        self.nodes, self.empty = nodes, nodes_sd3.EmptySD3LatentImage
        self.encode_edit = nodes_qwen.TextEncodeQwenImageEditPlus
        self.reference = nodes_edit_model.ReferenceLatent

    @torch.inference_mode()
    def draw(
        self,
        text: str,
        size: tuple[int, int] = (256, 256),
        settings: Settings = Settings(),
        negative: str = "",
    ) -> np.ndarray:
        """(H, W, 3) bytes; `size` is width and height."""
        encode = self.nodes.CLIPTextEncode().encode
        encoded = [encode(self.clip, words)[0] for words in (text, negative)]
        return self._sample(*encoded, size, settings)

    @torch.inference_mode()
    def edit(self, text: str, picture: np.ndarray, settings: Settings = Settings()) -> np.ndarray:
        """The picture (H, W, 3) changed as the text says, in the same size."""
        image = torch.from_numpy(picture.astype(np.float32) / 255)[None]
        latent = self.nodes.VAEEncode().encode(self.vae, image)[0]
        texts = (
            self.encode_edit.execute(self.clip, words, image1=image).args[0] for words in (text, "")
        )
        positive, negative = (self.reference.execute(t, latent).args[0] for t in texts)
        return self._sample(positive, negative, picture.shape[1::-1], settings)

    def _sample(
        self, positive: Any, negative: Any, size: tuple[int, int], settings: Settings
    ) -> np.ndarray:
        s, empty = settings, self.empty.execute(*size).args[0]
        latent = self.nodes.KSampler().sample(
            *(self.model, s.seed, s.steps, s.cfg, s.sampler, s.scheduler),
            *(positive, negative, empty),
        )[0]
        image = self.nodes.VAEDecode().decode(self.vae, latent)[0]
        return (image[0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
