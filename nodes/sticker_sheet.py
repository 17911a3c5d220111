"""Sticker Sheet: animals cut out of plain backgrounds, with a white edge, on a sheet to print."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io
from torch import Tensor

from ..core.cut_out import NOT_PLAIN, NOTHING, Sticker, cut_out
from ..core.paper import AS_PICTURE, SHEETS
from ..core.stickers import Layout, drawn_on, places, single
from .disk import new_picture
from .status import shown

EMPTY = "image holds no picture. Connect at least one."
WHITE = "white"
BACKGROUNDS = {WHITE: (1.0, 1.0, 1.0), "pale blue": (0.87, 0.94, 0.98), "cream": (1.0, 0.96, 0.87)}
AS_PICTURE_MARGIN = 0.03  # of the shorter side


class StickerSheet(io.ComfyNode):
    """Pictures into stickers and a sheet of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMStickerSheet.md."""
        return io.Schema(
            node_id="QwenVRAMStickerSheet",
            display_name="Sticker Sheet (Qwen VRAM)",
            category="Qwen VRAM/children",
            description=(
                "Cuts an animal out of its plain background, gives it a white edge, and fills a "
                "sheet with it. Several pictures take turns. Works on the CPU without a model."
            ),
            search_aliases=["stickers", "cut out", "remove background", "die cut", "kids"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip=(
                        "A picture with a plain background, a batch or a list of them. One with "
                        "alpha is cut by that."
                    ),
                ),
                *cls.inputs_of_the_places(),
                *cls.inputs_of_the_sheet(),
                *cls.inputs_of_chance(),
            ],
            outputs=[
                io.Image.Output(display_name="sheet"),
                io.Image.Output(display_name="sticker", is_output_list=True),
                io.Mask.Output(display_name="mask", is_output_list=True),
            ],
        )

    @classmethod
    def inputs_of_the_places(cls) -> list[io.Input]:
        """How many there are, and their edge."""
        return [
            io.Int.Input(
                "columns",
                default=0,
                min=0,
                max=20,
                tooltip=(
                    "How many stickers side by side. 0: as many as suit the animal's shape; if "
                    "rows is 0, too, at least 12 on the sheet."
                ),
            ),
            io.Int.Input(
                "rows",
                default=0,
                min=0,
                max=20,
                tooltip="How many below each other. 0: as many as suit the animal's shape.",
            ),
            io.Float.Input(
                "border",
                default=30.0,
                min=0.0,
                max=150.0,
                step=1.0,
                tooltip=(
                    "How wide the white edge around an animal is, in thousandths of the picture's "
                    "shorter side."
                ),
            ),
        ]

    @classmethod
    def inputs_of_the_sheet(cls) -> list[io.Input]:
        """What they lie on."""
        return [
            io.Combo.Input(
                "paper",
                options=[AS_PICTURE, *SHEETS],
                default="A4 portrait, 150 dpi",
                tooltip="The sheet, with 10 mm of white around, or as large as the first picture.",
            ),
            io.Combo.Input(
                "background",
                options=list(BACKGROUNDS),
                default=WHITE,
                tooltip="The sheet's colour. On each of them a thin grey line shows where to cut.",
            ),
        ]

    @classmethod
    def inputs_of_chance(cls) -> list[io.Input]:
        """How much stickers differ."""
        return [
            io.Float.Input(
                "size_variation",
                default=25.0,
                min=0.0,
                max=60.0,
                step=5.0,
                advanced=True,
                tooltip="By how many percent some stickers are smaller. 0: all fill their place.",
            ),
            io.Float.Input(
                "turn",
                default=12.0,
                min=0.0,
                max=45.0,
                step=1.0,
                advanced=True,
                tooltip="By how many degrees stickers are turned at most. 0: all stand upright.",
            ),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=0xFFFFFFFF,
                control_after_generate=io.ControlAfterGenerate.fixed,
                advanced=True,
                tooltip="Another number gives other sizes and turns; the same one the same sheet.",
            ),
        ]

    @classmethod
    def execute(
        cls,
        image: list[Tensor],
        columns: list[int],
        rows: list[int],
        border: list[float],
        paper: list[str],
        background: list[str],
        size_variation: list[float],
        turn: list[float],
        seed: list[int],
    ) -> io.NodeOutput:
        """One sheet of all, and each sticker."""
        layout = Layout(columns[0], rows[0], size_variation[0] / 100, turn[0], seed[0])
        _check(image, layout, border[0], paper[0], background[0])
        cut = _cut(image, border[0])
        every = [sticker for batch in cut for sticker in batch]
        sheet, count = _sheet(every, layout, paper[0], BACKGROUNDS[background[0]])
        singles = [_batch(batch) for batch in cut]
        text = f"{_counted(count)}, {sheet.shape[2]} x {sheet.shape[1]} pixels; {_told(every)}"
        return shown(sheet, [s[0] for s in singles], [s[1] for s in singles], text=text)


def _check(
    images: Sequence[Tensor], layout: Layout, border: float, paper: str, background: str
) -> None:
    layout.check()
    if not images or any(image.ndim != 4 or not image.numel() for image in images):
        raise ValueError(EMPTY)
    if not 0 <= border <= 150:
        raise ValueError(f"border is {border:g}: give 0 to 150 thousandths of the picture.")
    if paper != AS_PICTURE and paper not in SHEETS:
        raise ValueError(f"paper is {paper!r}: choose {AS_PICTURE!r} or one of {list(SHEETS)}.")
    if background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}: choose one of {list(BACKGROUNDS)}.")


def _cut(images: Sequence[Tensor], border: float) -> list[list[Sticker]]:
    """The stickers of each batch."""
    bar = ProgressBar(sum(len(image) for image in images))
    found: list[list[Sticker]] = []
    for image in images:
        found.append([])
        for picture in image:
            model_management.throw_exception_if_processing_interrupted()
            found[-1].append(cut_out(picture, border))
            bar.update(1)
    return found


def _sheet(
    stickers: Sequence[Sticker], layout: Layout, paper: str, colour: Sequence[float]
) -> tuple[Tensor, int]:
    """The sheet (1, h, w, 3), and how many stickers it has."""
    if paper == AS_PICTURE:
        height, width = stickers[0].picture.shape[:2]
        margin = round(AS_PICTURE_MARGIN * min(width, height))
    else:
        width, height, margin = SHEETS[paper]
    sheet = new_picture((1, height, width, 3))
    sheet += torch.tensor(colour)
    area = (margin, margin, width - 2 * margin, height - 2 * margin)
    found = places([sticker.outline for sticker in stickers], area, layout)
    for place in found:
        model_management.throw_exception_if_processing_interrupted()
        drawn_on(sheet[0], stickers[place.number], place)
    return sheet, len(found)


def _batch(stickers: Sequence[Sticker]) -> tuple[Tensor, Tensor]:
    """The stickers of a batch (b, h, w, 3) and their masks (b, h, w), cut to one box of all."""
    lefts, tops, rights, bottoms = zip(*(sticker.box for sticker in stickers), strict=True)
    box = (min(lefts), min(tops), max(rights), max(bottoms))
    drawn = [single(sticker, box) for sticker in stickers]
    return torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])


def _counted(count: int) -> str:
    return "1 sticker" if count == 1 else f"{count} stickers"


def _told(stickers: Sequence[Sticker]) -> str:
    """What was cut out of the pictures, and which stayed whole."""
    cut = [f"{sticker.share:.0%}" for sticker in stickers if not sticker.whole]
    told = [f"cut out {', '.join(cut)} of the picture"] if cut else []
    for why in (NOT_PLAIN, NOTHING):
        whole = [str(n) for n, sticker in enumerate(stickers, start=1) if sticker.whole == why]
        which = "" if len(stickers) == 1 else f" {', '.join(whole)}"
        told += [f"picture{which} {why}"] if whole else []
    return "; ".join(told)


NODES = [StickerSheet]
