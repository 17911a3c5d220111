"""What the settings dialog stores is what the next start reads."""

from __future__ import annotations

import json

from pack.core.allocator import choice_of, to_text
from pack.demo.server import Server
from pack.tests.browser.editor import Editor

SET = """async values => {
    for (const [name, value] of Object.entries(values))
        await app.extensionManager.setting.set(`QwenVRAM.Allocator.${name}`, value);
}"""
GET = (
    """names => names.map(name => app.extensionManager.setting.get(`QwenVRAM.Allocator.${name}`))"""
)
USUAL = {
    "Backend": "leave as it is",
    "MaxSplitSizeMB": 0,
    "ExpandableSegments": "leave as it is",
    "GarbageCollectionThreshold": 0,
    "RoundupPower2Divisions": "",
}
CHOSEN = {
    "Backend": "native",
    "MaxSplitSizeMB": 128,
    "ExpandableSegments": "off",
    "GarbageCollectionThreshold": 0.85,
    "RoundupPower2Divisions": "[256:1,512:2,>:8]",
}


def test_the_dialog_and_the_start_understand_each_other(
    editor: Editor, official_names: Server
) -> None:
    file = official_names.base / "user" / "default" / "comfy.settings.json"
    assert editor.page.evaluate(GET, list(USUAL)) == list(USUAL.values())
    try:
        editor.page.evaluate(SET, CHOSEN)
        choice, problems = choice_of(json.loads(file.read_text(encoding="utf-8")))
        assert problems == []
        assert to_text(choice) == (
            "backend:native,max_split_size_mb:128,expandable_segments:False,"
            "garbage_collection_threshold:0.85,roundup_power2_divisions:[256:1,512:2,>:8]"
        )
    finally:
        editor.page.evaluate(SET, USUAL)
    assert choice_of(json.loads(file.read_text(encoding="utf-8"))) == ({}, [])
