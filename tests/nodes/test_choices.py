"""The choices of every node have a Chinese name, except where the English one is a name itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pack.tests.conftest import ROOT

CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Formats, packages, devices and algorithms are called the same in every language. What has its
# Chinese name in the value itself needs no other.
NAMES = re.compile(
    r"(bf|fp|int)\d+\w*|bnb_\w+|cpu|gpu:\d+|PyTorch SDPA|SDPA \w+|(flash-attn|SageAttention) \d"
    r"|xFormers|comfy-kitchen int8"
)
# Lists of files, and ComfyUI's own lists, which its nodes show in English too.
NOT_OURS = {"unet_name", "clip_name", "vae_name", "sampler_name", "scheduler"}


def choices(host) -> Iterator[tuple[str, str, list[str]]]:
    """Node, input and the values of every list of choices of this pack."""
    for node_id, cls in host.nodes.NODE_CLASS_MAPPINGS.items():
        if not node_id.startswith("QwenVRAM"):
            continue
        for inputs in cls.INPUT_TYPES().values():
            for name, given in inputs.items():
                if given[0] == "COMBO" and name not in NOT_OURS:
                    yield node_id, name, list(given[1]["options"])


def test_every_choice_has_a_chinese_name(host) -> None:
    file = ROOT / "locales" / "zh" / "nodeDefs.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    offered = {(node, name): values for node, name, values in choices(host)}
    assert len(offered) > 20
    told = {
        (node, name): entry["options"]
        for node, known in entries.items()
        for name, entry in known["inputs"].items()
        if "options" in entry
    }
    for place, values in offered.items():
        named = {v for v in values if not NAMES.fullmatch(v) and not CHINESE.search(v)}
        assert named == set(told.pop(place, {})), place
    assert told == {}  # for inputs that have no choices
    texts = [
        text
        for known in entries.values()
        for entry in known["inputs"].values()
        for text in entry.get("options", {}).values()
    ]
    assert texts and all(CHINESE.search(text) for text in texts)
