"""Trains the embedded model on one GPU: `python -m demo.train OUT`, see demo/README.md.

Every finished stage leaves its file in OUT and is not repeated; the transformer leaves a
checkpoint every minute. The same command therefore continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from .classifier import load as load_classifier
from .edits import scene_edit
from .embedded import CLASSIFIER, TEXT_ENCODER, TRANSFORMER, VAE
from .figures import contact_sheet
from .prompts import held_out
from .training import autoencoder, networks, quality
from .training.context import Text
from .training.data import World
from .training.denoiser import Denoiser, Schedule
from .training.host import wan
from .training.text_encoder import TextEncoder, asked_of_edits, asked_of_scenes
from .training.text_training import Reader, reading, train_text_encoder
from .training.weights import Weights
from .training.world import Groups, draw_scenes

CHECKPOINT, FIGURES = "checkpoint.safetensors", "figures.json"


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results and of the checkpoint")
    parser.add_argument("--vae-steps", type=positive, default=4000)
    parser.add_argument("--text-steps", type=positive, default=8000)
    parser.add_argument("--steps", type=positive, default=25000)
    parser.add_argument(
        "--stop-after", type=float, default=1e9, help="seconds, then leave a checkpoint"
    )
    parser.add_argument("--tokens", type=positive, default=72_000, help="tokens in a batch")
    parser.add_argument("--pictures", type=float, default=1.0, help="share of the data; toy: 0.002")
    parser.add_argument("--judge", type=positive, default=1000, help="pictures for the figures")
    return parser.parse_args()


class Run:
    """One training run: its folder, its figures, its data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.start = time.time()
        torch.backends.cuda.matmul.allow_tf32 = True
        self.out.mkdir(parents=True, exist_ok=True)
        earlier = self.out / FIGURES
        self.figures = json.loads(earlier.read_text()) if earlier.exists() else {}
        self.world = World(options.pictures)
        self.say("drawing", sum(len(sheet.pictures.scenes) for sheet in self.world.sheets))

    def say(self, *what: object) -> None:
        """One line with the time."""
        print(f"[{time.time() - self.start:5.0f}s]", *what, flush=True)

    def note(self, figures: dict[str, object]) -> None:
        """Keeps figures beside the weights."""
        self.figures.update(figures)
        partial = self.out / f"{FIGURES}.partial"
        partial.write_text(json.dumps(self.figures, indent=1))
        os.replace(partial, self.out / FIGURES)

    # ----------------------------------------------------------------------------- the stages
    def vae(self) -> wan.WanVAE:
        """Trained or loaded, with the rounding that the file has."""
        path = self.out / VAE
        if not path.exists():
            batch = 32 if self.device == "cuda" else 4
            vae, figures = autoencoder.train_vae(
                self.world.vae_sheets, self.options.vae_steps, batch, self.device
            )
            self.note(figures)
            self.say(figures)
            networks.save({k: v.half() for k, v in vae.state_dict().items()}, path, {})
            sheet = self.world.vae_sheets[0].pixels[:8]
            back = autoencoder.encode(vae, autoencoder.pixels(sheet, self.device))
            rows = [*sheet, *autoencoder.to_bytes(autoencoder.decode(vae, back))]
            contact_sheet(rows, 8, self.out / "sheet_vae.png")
        vae = networks.new_vae()
        vae.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        wan.CausalConv3d.forward = networks.flat_convolution
        return vae.requires_grad_(False).to(self.device)

    def classifier(self, vae: wan.WanVAE) -> torch.nn.Module:
        """Trained or loaded."""
        path = self.out / CLASSIFIER
        if not path.exists():
            steps = int(max(30, 4000 * min(1, self.options.pictures)))
            judge, figures = autoencoder.train_classifier(
                self.world.vae_sheets[0], vae, steps, self.device
            )
            self.note(figures)
            self.say(figures)
            state = {k: v.half() for k, v in judge.state_dict().items() if "num_batches" not in k}
            networks.save(state, path, {})
        return load_classifier(path).to(self.device)

    def text(self) -> tuple[Text, dict[str, Groups]]:
        """The text encoder, trained or loaded, and all prompts as tokens."""
        path = self.out / TEXT_ENCODER
        text = Text(TextEncoder(), self.device)
        self.world.show(text)
        groups = self.world.groups(text)
        self.say("prompts ready")
        if not path.exists():
            lessons = self.world.lessons(text, groups)
            reader, figures = train_text_encoder(text, lessons, self.options.text_steps)
            figures["text_right"] = self.read(text, reader)
            self.note(figures)
            self.say(figures)
            text.encoder.save(path)
        state = {k: v.float() for k, v in load_file(path).items()}
        missing, unknown = text.encoder.load_state_dict(state, strict=False)
        if unknown or missing != ["model.embed_tokens.weight"]:
            raise RuntimeError(
                f"{path} is another encoder (it lacks {missing}, has {unknown}); delete it, and "
                "the command trains a new one."
            )
        text.encoder.requires_grad_(False)
        self.world.show(text)  # with the rounding of the file
        return text, groups

    def read(self, text: Text, reader: Reader) -> dict[str, object]:
        """What the text encoder understands of prompts that it has not seen."""
        rng, count = random.Random(904), min(500, self.options.judge)
        scenes, texts = draw_scenes(905, count)
        asked = asked_of_scenes(scenes)
        unaccented = asked_of_scenes([replace(scene, accent="") for scene in scenes])
        held = [held_out(rng, scene) for scene in scenes]
        kinds, before, after, edits = zip(*(scene_edit(rng, 1) for _ in scenes), strict=True)
        tokens = text.tokens
        return {
            "seen": reading(text, reader, tokens(texts[:: len(texts) // count]), asked),
            "held_out": reading(text, reader, tokens(held), unaccented),
            "edits": reading(
                text,
                reader,
                tokens([row[0] for row in edits]),
                asked_of_edits(kinds, before, after),
            ),
        }

    def go(self) -> None:
        """Everything, in order."""
        o = self.options
        vae = self.vae()
        judge = self.classifier(vae)
        text, groups = self.text()
        buckets = self.world.buckets(groups, vae, self.device)
        self.say("latents ready")
        weights = Weights(text.encoder.model.norm.weight.shape[0], self.device)
        if (self.out / CHECKPOINT).exists():
            weights.load(self.out / CHECKPOINT)
            self.say("resumed at step", weights.step)
        schedule = Schedule(o.steps, o.stop_after, o.tokens)
        denoiser = Denoiser(weights, text, buckets, schedule)
        self.note(denoiser.train(lambda: weights.save(self.out / CHECKPOINT)))
        self.note({"step": weights.step})
        if weights.step < o.steps:
            self.say("stopped at step", weights.step, "- the same command goes on from there")
            return
        weights.export(self.out / TRANSFORMER)
        self.say("trained", weights.step)
        subject = quality.Judge(weights.result(), vae, judge, text, self.device)
        self.note(quality.judge(subject, o.judge, self.out))
        self.say(json.dumps(self.figures, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    given = options()
    if (given.out / TRANSFORMER).exists():
        print(f"{given.out / TRANSFORMER} is there already; delete it to train another.")
    else:
        Run(given).go()
