"""Whether the phrases of Cute Animal Prompt leave a child's words alone, on the embedded model.

Usage: COMFYUI_PATH=... python -m benchmarks.cute_animal_words [--count 40] [--sheet FILE.png]

The same prompts and noise three times, at 256x256 on the CPU: the words alone, with the phrases of
a style and a palette drawn by lot, and with the fixed negative prompt beside them. The classifier
of the demo judges each picture. The embedded model knows no style: what is measured is harm.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a program, not by the tests
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]
    sys.modules["pack"].__file__ = str(ROOT / "__init__.py")

from pack.core.cute_animal import BACKGROUNDS, NEGATIVE, PALETTES, STYLES, positive  # noqa: E402
from pack.demo import classifier, environment, prompts  # noqa: E402
from pack.demo.artist import Artist, Settings, import_comfyui  # noqa: E402
from pack.demo.figures import scenes_to_judge, shares_of, to_tensor  # noqa: E402

SEED = 77
SHEET = ("a little bear with a hat", "一只戴帽子的小熊")
PLAIN, AS_SAID = BACKGROUNDS


def draw(artist: Artist, texts: list[str], negative: str) -> list[np.ndarray]:
    """One picture for each prompt, each from noise of its own."""
    return [
        artist.draw(text, settings=Settings(seed=seed), negative=negative)
        for seed, text in enumerate(texts)
    ]


def measure(artist: Artist, count: int) -> None:
    """Print the shares judged right."""
    rng, scenes = random.Random(SEED), scenes_to_judge(count)
    words = [prompts.describe(rng, scene) for scene in scenes]
    full = [
        positive(
            text,
            rng.choice(list(STYLES)),
            rng.choice(list(PALETTES)),
            PLAIN if scene.background == "plain" else AS_SAID,
        )
        for text, scene in zip(words, scenes, strict=True)
    ]
    judge = classifier.load()
    print("| prompts | animal | colour | accessory | action | background | all five |")
    print("|---|---|---|---|---|---|---|")
    ways = (("words", words, ""), ("with phrases", full, ""), ("and the negative", full, NEGATIVE))
    for name, texts, negative in ways:
        hits = classifier.right(judge, to_tensor(draw(artist, texts, negative)), scenes)
        shares = " | ".join(f"{share:.3f}" for share in shares_of(hits).values())
        print(f"| {name}, {count} prompts | {shares} |", flush=True)


def sheet(artist: Artist, path: Path) -> None:
    """Every style in both languages, with the palettes in turn."""
    palettes = list(PALETTES)
    rows = []
    for words in SHEET:
        looks = [(style, palettes[n % len(palettes)]) for n, style in enumerate(STYLES)]
        texts = [positive(words, *look, PLAIN) for look in looks]
        rows.append(np.concatenate(draw(artist, texts, NEGATIVE), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    """Measure, and draw the sheet if one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    comfyui = environment.find_comfyui()
    if comfyui is None:
        raise SystemExit("ComfyUI was not found. Set COMFYUI_PATH.")
    import_comfyui(comfyui, cpu=True)
    artist = Artist(ROOT / "demo" / "models")
    if given.count:
        measure(artist, given.count)
    if given.sheet:
        sheet(artist, given.sheet)


if __name__ == "__main__":
    main()
