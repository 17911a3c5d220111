"""Kind Words: hands on a child's words, or answers kindly where they are nothing for children."""

from __future__ import annotations

import logging

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..core.graph_identity import digest
from ..core.kind_words import (
    DRAW_SOMETHING_KIND,
    WHEN_FOUND,
    WordList,
    entries_of,
    judge,
    language_of,
    list_digest,
    word_list,
)
from .settings import locale, words_for_children
from .status import shown

log = logging.getLogger("qwen_vram")

FINE = {"en": "kind words", "zh": "友好的词语"}
AVOID_SETTING = "Also avoid, under Words for children in ComfyUI's settings"
ALLOWED_SETTING = "Always allow, under Words for children in ComfyUI's settings"
FOR_CHILDREN = ("kids", "children", "儿童")  # what people search for


def words_input(name: str, *, tooltip: str) -> io.Input:
    """The box that a child writes into, in every node that has one."""
    return io.String.Input(
        name,
        multiline=True,
        placeholder="What shall we draw? · 想画什么？",
        default="",
        tooltip=tooltip,
    )


class KindWords(io.ComfyNode):
    """Between the box that a child writes into and the prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMKindWords.md."""
        return io.Schema(
            node_id="QwenVRAMKindWords",
            display_name="Kind Words (Qwen VRAM)",
            category="Qwen VRAM/children",
            description=(
                "Looks for words that are nothing for children, in English and Chinese, and draws "
                "something kind instead, or stops, with a friendly sentence. A list of words is no "
                "guarantee."
            ),
            search_aliases=[*FOR_CHILDREN, "word filter", "safe", "block list", "过滤"],
            inputs=[*cls.inputs_of_the_words(), *cls.inputs_of_the_list()],
            outputs=[
                io.String.Output(display_name="words"),
                io.String.Output(display_name="answer"),
                io.Boolean.Output(display_name="kind"),
            ],
            has_intermediate_output=True,  # the answer comes, too, where ComfyUI had the result
        )

    @classmethod
    def inputs_of_the_words(cls) -> list[io.Input]:
        """What the child wrote, and what becomes of it."""
        return [
            words_input("words", tooltip="What the child wants to see, in English or Chinese."),
            io.Combo.Input(
                "when_found",
                options=list(WHEN_FOUND),
                default=DRAW_SOMETHING_KIND,
                tooltip=(
                    "When a word of the list is found: draw the subject in instead, or stop "
                    "without a picture. Both say so kindly, and do not repeat the word."
                ),
            ),
            io.String.Input(
                "instead",
                default="",
                tooltip=(
                    "What to draw instead. Empty: a little bear with a balloon, in the language of "
                    "the words. Your own in both languages: English · Chinese."
                ),
            ),
        ]

    @classmethod
    def inputs_of_the_list(cls) -> list[io.Input]:
        """What people add to the list."""
        return [
            io.String.Input(
                "also_avoid",
                multiline=True,
                placeholder="also avoid · 另外回避",
                default="",
                tooltip="More words and phrases to avoid: one per line, or between commas.",
                advanced=True,
            ),
            io.String.Input(
                "allowed",
                multiline=True,
                placeholder="allowed · 允许",
                default="",
                tooltip=(
                    "Words and phrases that are fine here though the list has them: one per line, "
                    "or between commas. What also_avoid names too is avoided."
                ),
                advanced=True,
            ),
        ]

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        """Changes with ComfyUI's settings and with the list."""
        return cls.beside_the_graph()

    @classmethod
    def beside_the_graph(cls) -> str:
        """What the outputs depend on beside the inputs; the prompt cache asks for it, too."""
        return digest(list_digest(), words_for_children(), locale())

    @classmethod
    def execute(
        cls, words: str, when_found: str, instead: str, also_avoid: str = "", allowed: str = ""
    ) -> io.NodeOutput:
        """Look, hand on, and answer."""
        known = _known(also_avoid, allowed)
        verdict = judge(words, when_found, instead, known, locale())
        if verdict.categories:  # what was written stays private
            log.info("Kind Words: found an entry of %s.", ", ".join(verdict.categories))
        text = verdict.answer or FINE[language_of(words)]
        handed_on = ExecutionBlocker(None) if verdict.words is None else verdict.words
        facts = {"answer": verdict.answer, "kind": verdict.kind}
        facts |= {"stopped": verdict.words is None, "categories": list(verdict.categories)}
        return shown(handed_on, verdict.answer, verdict.kind, text=text, **facts)


def _known(also_avoid: str, allowed: str) -> WordList:
    """The list with what the node and ComfyUI's settings add. Raises ValueError.

    With several users (--multi-user) what one of them avoids is avoided for all, and allowed is
    what all of them allow.
    """
    avoid, allow = [*entries_of(also_avoid, "also_avoid")], [*entries_of(allowed, "allowed")]
    everyone = words_for_children()
    for avoided, _ in everyone:
        avoid += entries_of(avoided, AVOID_SETTING)
    of_users = [entries_of(text, ALLOWED_SETTING) for _, text in everyone]
    shared = set.intersection(*map(set, of_users)) if of_users else set()
    return word_list(tuple(dict.fromkeys(avoid)), tuple(dict.fromkeys([*allow, *sorted(shared)])))


NODES = [KindWords]
