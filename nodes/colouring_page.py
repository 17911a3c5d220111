"""Colouring Page: a picture as black lines on white, to be printed and coloured in."""

from __future__ import annotations

from collections.abc import Sequence

from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io
from torch import Tensor

from ..core.line_art import PageSettings, as_image, colouring_page, size_of_page
from ..core.paper import AS_PICTURE, SHEETS
from .disk import new_picture
from .status import shown

EMPTY = "image holds no picture. Connect at least one."


class ColouringPage(io.ComfyNode):
    """Pictures into pages of lines."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMColouringPage.md."""
        return io.Schema(
            node_id="QwenVRAMColouringPage",
            display_name="Colouring Page (Qwen VRAM)",
            category="Qwen VRAM/children",
            description=(
                "Turns a picture into a page to colour in: closed black lines on white. Works on "
                "the CPU without a model."
            ),
            search_aliases=["coloring page", "line art", "lineart", "outline", "edges", "kids"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip=(
                        "The picture, best one with clear shapes. Each of a batch becomes a page. "
                        "Where it is transparent it counts as white."
                    ),
                ),
                *cls.inputs_of_the_page(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def inputs_of_the_page(cls) -> list[io.Input]:
        """How it is drawn."""
        return [
            io.Float.Input(
                "line_width",
                default=6.0,
                min=1.0,
                max=50.0,
                step=0.5,
                tooltip=(
                    "How thick lines are, in thousandths of the picture's shorter side; at "
                    "least 1 pixel. 6 is about 1 mm on A4."
                ),
            ),
            io.Int.Input(
                "detail",
                default=3,
                min=1,
                max=5,
                tooltip="1: few lines, for small children. 5: also weak edges and small parts.",
            ),
            io.Combo.Input(
                "paper",
                options=[AS_PICTURE, *SHEETS],
                default=AS_PICTURE,
                tooltip=(
                    "As large as the picture, or a sheet to print with 10 mm of white around, "
                    "filled with what is drawn. Lines are drawn in the size of the sheet and stay "
                    "sharp."
                ),
            ),
        ]

    @classmethod
    def execute(cls, image: Tensor, line_width: float, detail: int, paper: str) -> io.NodeOutput:
        """One page for each picture."""
        settings = PageSettings(line_width, detail, paper)
        settings.check()
        if image.ndim != 4 or not image.numel():
            raise ValueError(EMPTY)
        width, height = size_of_page(image, paper)
        pages = new_picture((len(image), height, width, 3))
        areas, bar = [], ProgressBar(len(image))
        for index, picture in enumerate(image):
            model_management.throw_exception_if_processing_interrupted()
            page = colouring_page(picture, settings)
            pages[index] = as_image(page.drawing)
            areas.append(page.areas)
            bar.update(1)
        return shown(pages, text=f"{_areas(areas)}, {width} x {height} pixels")


def _areas(areas: Sequence[int]) -> str:
    """What there is to colour in, on each page."""
    if max(areas) == 1:
        return "no lines found: try more detail"
    counts = ", ".join(map(str, areas[:8])) + (", ..." if len(areas) > 8 else "")
    return f"about {counts} areas to colour"  # narrow ones may be closed by the lines


NODES = [ColouringPage]
