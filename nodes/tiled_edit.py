"""An edit of a picture of any size: by tiles, guided by an edit of the whole."""

from __future__ import annotations

import weakref
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
from .disk import new_picture
from .edit_encoding import EditEncoder, Outcome, announce
from .encoding import Lookup
from .loaders import REGISTRY
from .outcome import Metadata, running_node
from .pictures import ONE_MEGAPIXEL, Picture, Size, pictures_of
from .status import shown
from .tile_canvas import Canvas, Mask, multiple
from .tile_coding import Coder, require_qwen_vae
from .tile_editing import TOGETHER, Edit, Edited
from .tile_report import Report, plan_of
from .tile_sampling import Progress, Sampling, require_edit_model, takes_negative
from .tiled_diffusion import require_tileable
from .tiled_edit_inputs import Given, require_picture, require_tiles

WAITING = encoding.Waiting()


class Asked(NamedTuple):
    """All that prompts depend on; `both`: the negative, too."""

    image: Tensor
    image2: Tensor | None
    image3: Tensor | None
    instruction: str
    negative: str
    both: bool
    cache: str

    @property
    def pictures(self) -> list[list[Picture]]:
        """Those that the text encoder sees, for each picture of the batch. Raises ValueError."""
        require_picture(self.image)
        found = []
        for picture in self.image.split(1):
            colours = Canvas(picture).rgb if picture.shape[-1] == 1 else picture
            # Their sizes count for the pictures that are seen whole.
            seen = [colours, self.image2, self.image3]
            found.append(pictures_of(seen, ONE_MEGAPIXEL, Size(0, 0)))
        return found

    def weak(self) -> tuple[Any, ...]:
        """To compare with later, without keeping pictures: a loader may fail before the node."""
        return tuple(weakref.ref(v) if torch.is_tensor(v) else v for v in self)


class Prompts(NamedTuple):
    """What the store has for one picture of the batch: of the instruction, and of the negative."""

    positive: Lookup
    negative: Lookup | None


class Found(NamedTuple):
    """What was asked, and the answers for each picture."""

    asked: tuple[Any, ...]
    prompts: list[Prompts]

    def answers(self, asked: Asked) -> bool:
        """Whether this was asked; ComfyUI may make an input anew between two lazy checks."""
        return all(
            a() is b if isinstance(a, weakref.ref) else not torch.is_tensor(b) and a == b
            for a, b in zip(self.asked, asked, strict=True)
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
                "result has exactly the picture's size, and what its guide does not change keeps "
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
        require_picture(image)
        if mode == TOGETHER and max(map(multiple, image.shape[1:3])) > tile_size:
            require_tileable(model)
        if is_empty(mask):
            return []
        both = takes_negative(model, cfg)
        asked = Asked(image, image2, image3, instruction, negative, both, cache)
        context = get_executing_context()
        found = WAITING.get(context)
        if found is None or not found.answers(asked):
            found = cls.look_up(asked)
            WAITING.put(context, found)
        every = [p for f in found.prompts for p in (f.positive, f.negative) if p is not None]
        return ["vae"] if all(lookup.hit for lookup in every) else ["clip", "vae"]

    @classmethod
    def look_up(cls, asked: Asked) -> Found:
        """Search the store for the prompts of every picture. Raises ValueError."""
        encoder = EditEncoder(cls.hidden.dynprompt, asked.cache)
        prompts = []
        for pictures in asked.pictures:
            unwanted = encoder.look_up_text(asked.negative, pictures) if asked.both else None
            prompts.append(Prompts(encoder.look_up_text(asked.instruction, pictures), unwanted))
        return Found(asked.weak(), prompts)

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Edit the pictures one by one, and say what was done. Raises ValueError."""
        given = Given(**values)
        given.require_masks()
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        encoder = EditEncoder(cls.hidden.dynprompt, given.cache)
        run = _Run(given, encoder, Coder(given.vae, encoder))
        if is_empty(given.mask):
            made = run.all([None] * len(given.image))
        else:
            require_qwen_vae(given.vae)
            found = WAITING.take(get_executing_context())
            if found is None or not found.answers(run.asked):
                found = cls.look_up(run.asked)
            REGISTRY.forget_leaving()  # a model that was kept, and is neither kept nor needed now
            made = run.all(found.prompts)
        report = Report(given.settings(), made)
        outcomes = [*run.conditionings, *run.coder.outcomes]
        facts = report.facts()
        report.note(metadata.write(running_node(), facts))
        cached = announce(outcomes) if outcomes else {}
        return shown(
            run.image,
            run.edited,
            torch.cat([plan_of(p, m) for p, m in zip(given.image.split(1), made, strict=True)]),
            report.text(),
            text=report.line(run.conditionings, run.coder.outcomes),
            **cached,
            **facts,
        )


def is_empty(mask: Tensor | None) -> bool:
    """Whether there is a mask by which nothing may change."""
    return mask is not None and not bool((mask > 0).any())


class _Run:
    """What the pictures of a batch share; `image` and `edited` are their results, joined."""

    image: Tensor
    edited: Tensor

    def __init__(self, given: Given, encoder: EditEncoder, coder: Coder) -> None:
        self.given, self.encoder, self.coder = given, encoder, coder
        both = takes_negative(given.model, given.cfg)
        seen = (given.image, given.image2, given.image3)
        self.asked = Asked(*seen, given.instruction, given.negative, both, given.cache)
        self.conditionings: list[Outcome] = []
        self.progress = Progress(given.model, len(given.image))

    def all(self, prompts: Sequence[Prompts | None]) -> list[Edited]:
        """The pictures one by one; without prompts nothing is sampled. Raises ValueError."""
        made: list[Edited] = []
        pictures = self.asked.pictures
        for number, own in enumerate(prompts):
            one = self._edit(number, own, pictures[number])
            if len(prompts) == 1:
                self.image, self.edited = one.image, one.edited
                return [one]
            if not made:
                self.image, self.edited = (
                    new_picture((len(prompts), *t.shape[1:])) for t in (one.image, one.edited)
                )
            places = self.image[number : number + 1], self.edited[number : number + 1]
            for place, value in zip(places, (one.image, one.edited), strict=True):
                place.copy_(value)
            made.append(one._replace(image=places[0], edited=places[1]))
        return made

    def _edit(self, number: int, prompts: Prompts | None, pictures: list[Picture]) -> Edited:
        """One picture of the batch."""
        given = self.given
        canvas = Canvas(given.image[number : number + 1])
        mask = None
        if given.mask is not None:
            own = number if len(given.mask) > 1 else 0
            mask = Mask(given.mask[own : own + 1], canvas)
        others = [self.coder.reference(picture) for picture in pictures[1:]] if prompts else []
        sampling = self._sampling(prompts, pictures)
        settings = given.settings()
        return Edit(canvas, mask, settings, sampling, self.coder, self.progress, others).run()

    def _sampling(self, prompts: Prompts | None, pictures: list[Picture]) -> Sampling:
        """With the prompts of one picture."""
        given = self.given
        positive: list[Any] = []
        if prompts is not None:
            positive = self._conditioning(prompts.positive, given.instruction, pictures)
        negative = positive
        if prompts is not None and prompts.negative is not None:
            negative = self._conditioning(prompts.negative, given.negative, pictures)
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


NODES = [TiledEdit]
