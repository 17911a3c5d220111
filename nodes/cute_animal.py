"""Cute Animal Prompt: a child's words, with a style and colours that suit children."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.cute_animal import BACKGROUNDS, NEGATIVE, PALETTES, STYLES, positive
from ..core.kind_words import SUBJECT
from .kind_words import FOR_CHILDREN, words_input
from .status import shown

EMPTY = "words is empty: draws {}"


class CuteAnimalPrompt(io.ComfyNode):
    """Words, style and palette into one prompt; the negative one never changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMCuteAnimalPrompt.md."""
        return io.Schema(
            node_id="QwenVRAMCuteAnimalPrompt",
            display_name="Cute Animal Prompt (Qwen VRAM)",
            category="Qwen VRAM/children",
            description=(
                "Makes a prompt for a cute animal from a child's words, a style and a palette, in "
                "English or Chinese. The negative prompt never changes: it is encoded only once."
            ),
            search_aliases=[*FOR_CHILDREN, "animal", "style", "colouring", "可爱动物"],
            inputs=[*cls.inputs_of_the_prompt()],
            outputs=[
                io.String.Output(display_name="positive"),
                io.String.Output(display_name="negative"),
            ],
            has_intermediate_output=True,  # its line is the prompt, which stands in every run
        )

    @classmethod
    def inputs_of_the_prompt(cls) -> list[io.Input]:
        """The words, and how they are to look."""
        return [
            words_input(
                "words",
                tooltip="What to draw, in English or Chinese. It stands first in the prompt.",
            ),
            io.Combo.Input(
                "style",
                options=list(STYLES),
                default=next(iter(STYLES)),
                tooltip="What the picture looks like it is made of.",
            ),
            io.Combo.Input(
                "palette",
                options=list(PALETTES),
                default=next(iter(PALETTES)),
                tooltip="The mood of the colours. A colour in the words still counts.",
            ),
            io.Combo.Input(
                "background",
                options=list(BACKGROUNDS),
                default=next(iter(BACKGROUNDS)),
                optional=True,
                tooltip=(
                    "plain: for Colouring Page and Sticker Sheet. The other: nothing is said of "
                    "the background but what the words say."
                ),
            ),
        ]

    @classmethod
    def execute(
        cls, words: str, style: str, palette: str, background: str = next(iter(BACKGROUNDS))
    ) -> io.NodeOutput:
        """The two prompts."""
        prompt = positive(words, style, palette, background)
        text = prompt if words.strip() else EMPTY.format(SUBJECT["en"])
        return shown(prompt, NEGATIVE, text=text)


NODES = [CuteAnimalPrompt]
