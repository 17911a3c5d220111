"""Trains the embedded model on one GPU: `python -m demo.train OUT`, see demo/README.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from PIL import Image

from .training import autoencoder, networks, quality
from .training.denoiser import Bucket, Text, Trainer, train
from .training.world import Pictures, Tokens, by_length, draw_all, draw_edits, draw_scenes

# (width, height): (text to image: pictures, share), (edits: pairs, share)
SIZES = {
    (256, 256): ((64000, 40), (32000, 31)),
    (384, 384): ((8000, 6), (3000, 4)),
    (512, 512): ((5000, 4), (1500, 2)),
    (240, 320): ((3500, 2.5), (1500, 1.5)),
    (320, 240): ((3500, 2.5), (1500, 1.5)),
    (512, 288): ((2500, 2.5), (1000, 1)),
    (288, 512): ((1500, 1), (0, 0)),
}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results and of the checkpoint")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run's results")
    parser.add_argument("--cache", type=Path, help="folder for latents, for a later run here")
    parser.add_argument("--vae-steps", type=int, default=9000)
    parser.add_argument("--vae-seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--seconds", type=float, default=1e9, help="until the schedule's end")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds, then checkpoint")
    parser.add_argument("--budget", type=int, default=150_000, help="tokens in a batch")
    parser.add_argument("--pictures", type=float, default=1.0, help="share of the data; toy: 0.002")
    parser.add_argument("--judge", type=int, default=1000, help="pictures for the figures")
    return parser.parse_args()


class Run:
    """One training run: its folder, its figures, its data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.start = time.time()
        self.figures: dict[str, object] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        earlier = (options.resume or self.out) / "figures.json"
        if earlier.exists():
            self.figures = json.loads(earlier.read_text())

    def say(self, *what: object) -> None:
        """One line with the time."""
        print(f"[{time.time() - self.start:5.0f}s]", *what, flush=True)

    def note(self, figures: dict[str, object]) -> None:
        """Keeps figures beside the weights."""
        self.figures.update(figures)
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1))

    # ------------------------------------------------------------------------------- pictures
    def draw(self) -> None:
        """Starts all drawing; the VAE's pictures come first."""
        share = self.options.pictures

        def number(count: float) -> int:
            return int(max(count * share, 64)) if count else 0

        scenes = draw_scenes(101, number(12000))[0]
        marked = draw_edits(102, number(3000))[0]
        self.vae_sheets = [
            Pictures(scenes + marked, 256, 256),
            Pictures(draw_scenes(103, number(2500))[0], 384, 384),
            Pictures(draw_scenes(104, number(1500))[0], 512, 512),
            Pictures(draw_scenes(105, number(2000))[0], 320, 240),
        ]
        self.text_sheets, self.edit_sheets, self.texts, self.kinds = {}, {}, {}, {}
        for seed, (size, ((drawn, _), (pairs, _))) in enumerate(SIZES.items()):
            scenes, texts = draw_scenes(200 + seed, number(drawn))
            self.text_sheets[size] = Pictures(scenes, *size)
            self.texts["draw", size] = texts
            if pairs:
                before, after, texts, _ = draw_edits(300 + seed, number(pairs))
                self.edit_sheets[size] = (Pictures(before, *size), Pictures(after, *size))
                self.texts["edit", size] = texts
        everything = [*self.vae_sheets]
        if not self.cached():
            everything += self.text_sheets.values()
            everything += [sheet for pair in self.edit_sheets.values() for sheet in pair]
        self.pool = draw_all(everything)

    def cached(self) -> bool:
        """Whether an earlier run on this machine left its latents."""
        return self.options.cache is not None and (self.options.cache / "latents.pt").exists()

    def latents(self, sheet: Pictures) -> torch.Tensor:
        """(N, 16, h, w) as the transformer sees them."""
        pixels = torch.from_numpy(sheet.wait())
        size = max(1, 64 * 65536 // (sheet.width * sheet.height))
        parts = []
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            for i in range(0, len(pixels), size):
                x = autoencoder.pixels(pixels[i : i + size], self.device)
                parts.append(autoencoder.encode(self.vae, x).squeeze(2).bfloat16())
        return torch.cat(parts)

    def buckets(self) -> list[Bucket]:
        """Everything the transformer learns from."""
        tokens, rng = Tokens(), random.Random(400)
        smallest = 16 if self.options.pictures < 0.5 else 48
        if self.cached():
            stored = torch.load(self.options.cache / "latents.pt", weights_only=True)
            stored = {k: [t.to(self.device) for t in v] for k, v in stored.items()}
        else:
            stored = {}
            for size, sheet in self.text_sheets.items():
                stored[("draw", *size)] = [self.latents(sheet)]
            for size, pair in self.edit_sheets.items():
                stored[("edit", *size)] = [self.latents(sheet) for sheet in pair]
            if self.options.cache is not None:
                self.options.cache.mkdir(parents=True, exist_ok=True)
                kept = {k: [t.cpu() for t in v] for k, v in stored.items()}
                torch.save(kept, self.options.cache / "latents.pt")
        self.say("latents ready")
        buckets = []
        for (kind, *side), values in stored.items():
            size = (side[0], side[1])
            ids = tokens(self.texts[kind, size])
            owners = [i // 4 for i in range(len(ids))]
            groups = by_length(rng, ids, owners, smallest)
            weight = SIZES[size][kind == "edit"][1]
            before = values[0] if kind == "edit" else None
            name = f"{kind}_{size[0]}x{size[1]}"
            buckets.append(Bucket(name, weight, values[-1], groups, before))
        return buckets

    # --------------------------------------------------------------------------------- models
    def first_models(self) -> None:
        """VAE, text encoder and classifier: loaded from an earlier run, or made and trained."""
        from safetensors.torch import load_file

        resume = self.options.resume
        self.encoder = networks.TextEncoder()
        if resume and (resume / "vae.safetensors").exists():
            self.vae = networks.new_vae()
            self.vae.load_state_dict(
                {k: v.float() for k, v in load_file(resume / "vae.safetensors").items()}
            )
            self.vae.to(self.device)
            networks.wan.CausalConv3d.forward = networks.flat_convolution
            from .classifier import load

            self.judge = load(resume / "classifier.safetensors").to(self.device)
        else:
            o = self.options
            batch = 32 if self.device == "cuda" else 4
            self.vae, figures = autoencoder.train_vae(
                self.vae_sheets, o.vae_steps, o.vae_seconds, batch, self.device
            )
            self.note(figures)
            self.say(figures)
            steps = int(max(30, 4000 * min(1, o.pictures)))
            self.judge, figures = autoencoder.train_classifier(
                self.vae_sheets[0], self.vae, steps, self.device
            )
            self.note(figures)
            self.say(figures)
        self.vae.requires_grad_(False)
        half = {k: v.half() for k, v in self.vae.state_dict().items()}
        networks.save(half, self.out / "vae.safetensors", {})
        self.vae.load_state_dict({k: v.float() for k, v in half.items()})
        judge = {k: v.half() for k, v in self.judge.state_dict().items() if "num_batches" not in k}
        networks.save(judge, self.out / "classifier.safetensors", {})
        self.encoder.save(self.out / "text.safetensors")
        self.encoder.load_state_dict(
            {k: v.half().float() for k, v in self.encoder.state_dict().items()}
        )
        sheet = self.vae_sheets[0].pixels[:8]
        back = autoencoder.decode(
            self.vae, autoencoder.encode(self.vae, autoencoder.pixels(sheet, self.device))
        )
        rows = [*sheet, *autoencoder.to_bytes(back)]
        quality.contact_sheet(rows, 8, self.out / "sheet_vae.png")

    def texts_and_pictures(self) -> Text:
        """The prompt side of the training, with encoded pictures for the edit template."""
        text = Text(self.encoder, self.device)
        for seed, size in enumerate(SIZES):
            bank = 64 if self.options.pictures >= 0.5 else 4
            drawn = [quality.picture(scene, size) for scene in draw_scenes(500 + seed, bank)[0]]
            text.remember(torch.stack(drawn), *size)
        return text

    def go(self) -> None:
        """Everything, in order."""
        o = self.options
        self.draw()
        self.say("drawing", sum(len(p.scenes) for p in self.text_sheets.values()))
        self.first_models()
        text = self.texts_and_pictures()
        self.say("text ready")
        buckets = self.buckets()
        trainer = Trainer(self.device)
        begun = 0.0
        if o.resume and (o.resume / "master.safetensors").exists():
            trainer.load(o.resume)
            begun = float(self.figures["progress"])
            self.say("resumed at step", trainer.step, "progress", begun)

        def checkpoint(progress: float) -> None:
            trainer.save(self.out)
            self.note({"progress": progress, "step": trainer.step})

        stop_at = min(o.stop_after, 1e9)
        figures = train(
            trainer, buckets, text, o.steps, o.seconds, o.budget, begun, checkpoint, stop_at=stop_at
        )
        self.note(figures)
        self.say(figures)
        trainer.export(self.out / "transformer.safetensors")
        for p, average in zip(trainer.working, trainer.average, strict=True):
            p.data.copy_(average.bfloat16())
        judged = quality.judge(
            trainer.model, self.vae, self.judge, text, self.device, o.judge, self.out
        )
        self.note(judged)
        self.say(json.dumps(judged, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    Image.MAX_IMAGE_PIXELS = None
    Run(options()).go()
