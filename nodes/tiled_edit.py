"""An edit of a picture of any size: by tiles, guided by an edit of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from torch import Tensor

from . import encoding
from . import tiled_edit_inputs as inputs
from .edit_encoding import EditEncoder, Outcome, announce
from .encoding import Lookup
from .loaders import REGISTRY
from .outcome import Metadata, running_node
from .pictures import ONE_MEGAPIXEL, Picture, Size, pictures_of
from .status import shown
from .tile_canvas import Canvas, Mask
from .tile_coding import Coder, require_qwen_vae
from .tile_editing import Edit, Edited
from .tile_report import Report, plan_of
from .tile_sampling import Progress, Sampling, require_edit_model
from .tiled_edit_inputs import Given, require_picture, require_tiles

WAITING = encoding.Waiting()


class Prompts(NamedTuple):
    """What the store has for one picture of the batch: of the instruction, and of the negative."""

    pictures: list[Picture]
    positive: Lookup
    negative: Lookup | None


class Found(NamedTuple):
    """What was asked, and the answers for each picture."""

    asked: tuple[Any, ...]
    prompts: list[Prompts]

    def answers(self, asked: tuple[Any, ...]) -> bool:
        """Whether this was asked; ComfyUI may make an input anew between two lazy checks."""
        pairs = zip(self.asked, asked, strict=True)
        return all(
            a is b or not (torch.is_tensor(a) or torch.is_tensor(b)) and a == b for a, b in pairs
        )


class TiledEdit(io.ComfyNode):
    """Edit a picture of any size by an instruction; the result has the picture's exact size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMTiledEdit.md."""
        return io.Schema(
            node_id="QwenVRAMTiledEdit",
            display_name="Tiled Edit (Qwen VRAM)",
            category="Qwen VRAM/tiles",
            description=(
                "Edits a picture of any size with Qwen-Image-Edit, by overlapping tiles. The "
                "result has exactly the picture's size, and what the edit does not concern keeps "
                "its pixels."
            ),
            search_aliases=["tiled edit", "large image", "4k", "upscale edit", "seamless tiles"],
            inputs=[
                *inputs.what_is_edited(),
                *inputs.how_it_is_sampled(),
                *inputs.how_tiles_are_drawn(),
                *inputs.how_it_is_tiled(),
                *inputs.how_tiles_are_corrected(),
                *inputs.further_pictures(),
            ],
            outputs=[
                io.Image.Output(),
                io.Mask.Output(display_name="edited"),
                io.Image.Output(display_name="plan"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check_lazy_status(
        cls,
        image: Tensor,
        instruction: str,
        negative: str,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        mode: str,
        tile_size: int,
        overlap: int,
        guide: str,
        skip_threshold: float,
        registration: bool,
        colour_match: bool,
        window: str,
        cache: str,
        clip: comfy.sd.CLIP | None = None,
        vae: comfy.sd.VAE | None = None,
        mask: Tensor | None = None,
        image2: Tensor | None = None,
        image3: Tensor | None = None,
    ) -> list[str]:
        """Ask for the VAE, which decodes, and for the text encoder if a prompt is new."""
        require_edit_model(model)
        require_tiles(tile_size, overlap)
        asked = (image, image2, image3, instruction, negative, cfg, cache)
        context = get_executing_context()
        found = WAITING.get(context)
        if found is None or not found.answers(asked):
            found = cls.look_up(*asked)
            WAITING.put(context, found)
        every = [p for f in found.prompts for p in (f.positive, f.negative) if p is not None]
        return ["vae"] if all(lookup.hit for lookup in every) else ["clip", "vae"]

    @classmethod
    def look_up(
        cls,
        image: Tensor,
        image2: Tensor | None,
        image3: Tensor | None,
        instruction: str,
        negative: str,
        cfg: float,
        cache: str,
    ) -> Found:
        """Search the store for the prompts of every picture. Raises ValueError."""
        asked = (image, image2, image3, instruction, negative, cfg, cache)
        require_picture(image)
        encoder = EditEncoder(cls.hidden.dynprompt, cache)
        prompts = []
        for picture in image.split(1):
            colours = Canvas(picture).rgb if picture.shape[-1] == 1 else picture
            # Their sizes count for the pictures that are seen whole.
            pictures = pictures_of([colours, image2, image3], ONE_MEGAPIXEL, Size(0, 0))
            without = math.isclose(cfg, 1.0)
            unwanted = None if without else encoder.look_up_text(negative, pictures)
            wanted = encoder.look_up_text(instruction, pictures)
            prompts.append(Prompts(pictures, wanted, unwanted))
        return Found(asked, prompts)

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Edit the pictures one by one, and say what was done. Raises ValueError."""
        given = Given(**values)
        asked = tuple(values.get(name) for name in _ASKED)
        found = WAITING.take(get_executing_context())
        if found is None or not found.answers(asked):
            found = cls.look_up(*asked)
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        require_qwen_vae(given.vae)
        given.require_masks()
        REGISTRY.forget_leaving()  # a model that was kept, and is neither kept nor needed now
        encoder = EditEncoder(cls.hidden.dynprompt, given.cache)
        run = _Run(given, encoder, Coder(given.vae, encoder))
        made = [run.edit(number, prompts) for number, prompts in enumerate(found.prompts)]
        report = Report(given.settings(), made)
        outcomes = [*run.conditionings, *run.coder.outcomes]
        facts = report.facts()
        report.note(metadata.write(running_node(), facts))
        cached = announce(outcomes) if outcomes else {}
        return shown(
            _joined([m.image for m in made]),
            _joined([m.edited for m in made]),
            torch.cat([plan_of(p, m) for p, m in zip(given.image.split(1), made, strict=True)]),
            report.text(),
            text=report.line(run.conditionings, run.coder.outcomes),
            **cached,
            **facts,
        )


_ASKED = ("image", "image2", "image3", "instruction", "negative", "cfg", "cache")


class _Run:
    """What the pictures of a batch share."""

    def __init__(self, given: Given, encoder: EditEncoder, coder: Coder) -> None:
        self.given, self.encoder, self.coder = given, encoder, coder
        self.conditionings: list[Outcome] = []
        self.progress = Progress(given.model, len(given.image))

    def edit(self, number: int, prompts: Prompts) -> Edited:
        """One picture of the batch."""
        given = self.given
        canvas = Canvas(given.image[number : number + 1])
        mask = None
        if given.mask is not None:
            own = number if len(given.mask) > 1 else 0
            mask = Mask(given.mask[own : own + 1], canvas)
        others = [self.coder.reference(picture) for picture in prompts.pictures[1:]]
        sampling = self._sampling(prompts)
        settings = given.settings()
        return Edit(canvas, mask, settings, sampling, self.coder, self.progress, others).run()

    def _sampling(self, prompts: Prompts) -> Sampling:
        """With the prompts of one picture."""
        given = self.given
        positive = self._conditioning(prompts.positive, given.instruction, prompts.pictures)
        negative = positive
        if prompts.negative is not None:
            negative = self._conditioning(prompts.negative, given.negative, prompts.pictures)
        return Sampling(
            given.model,
            given.seed,
            given.steps,
            given.cfg,
            given.sampler_name,
            given.scheduler,
            positive,
            negative,
        )

    def _conditioning(self, found: Lookup, text: str, pictures: Sequence[Picture]) -> list[Any]:
        made = self.encoder.conditioning(found, self.given.clip, text, pictures)
        self.conditionings.append(made)
        return made.value


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Pictures as a batch; one alone is not copied."""
    return values[0] if len(values) == 1 else torch.cat(list(values))


NODES = [TiledEdit]
