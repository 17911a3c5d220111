"""The benchmark of Cute_Animal_For_Kids: the stock graph it compares with, and how it goes on."""

from __future__ import annotations

import contextlib
import json
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from pack.benchmarks import cute_animal, cute_animal_graphs
from pack.tests.graphs import node

SAMPLER = {"seed": 1, "steps": ["steps", 0], "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0}


def whole() -> dict[str, dict[str, Any]]:
    """A graph as the workflow's."""
    options = {"device": "default", "keep_loaded": False, "weight_dtype": "auto"}
    return {
        "box": node("PrimitiveStringMultiline", value="a cat"),
        "kind": node("QwenVRAMKindWords", words=["box", 0], instead="", when_found="stop"),
        "answer": node("PreviewAny", source=["kind", 1]),
        "text": node("QwenVRAMCuteAnimalPrompt", words=["kind", 0], style="s", palette="p"),
        "unet": node("QwenVRAMLoadDiffusionModel", unet_name="u", preset="best", **options),
        "clip": node("QwenVRAMLoadTextEncoder", clip_name="c", **options),
        "vae": node("QwenVRAMLoadVAE", vae_name="v", **options),
        "pos": node("QwenVRAMCachedTextEncode", clip=["clip", 0], text=["text", 0], cache="off"),
        "neg": node("QwenVRAMCachedTextEncode", clip=["clip", 0], text=["text", 1], cache="off"),
        "steps": node("PrimitiveInt", value=4),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "QwenVRAMSampler", model=["unet", 0], positive=["pos", 0], negative=["neg", 0],
            latent_image=["latent", 0], scheduler="simple", policy="exact only", vram_limit=0.0,
            settings="", **SAMPLER,
        ),
        "decode": node("QwenVRAMDecode", samples=["sampler", 0], vae=["vae", 0], vram_limit=0.0),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="a"),
        "page": node("QwenVRAMColouringPage", image=["decode", 0]),
        "save page": node("SaveImage", images=["page", 0], filename_prefix="b"),
        "sheet": node("QwenVRAMStickerSheet", image=["decode", 0]),
        "save sheet": node("SaveImage", images=["sheet", 0], filename_prefix="c"),
        "clear": node("QwenVRAMClear", value=["sheet", 0], level="cache"),
    }  # fmt: skip


def texts(words: str, style: str, palette: str) -> tuple[str, str]:
    """Stands in for the pack's own."""
    return f"{words}, {style}, {palette}", "nothing"


def test_the_stock_graph_is_the_same_work_by_stock_nodes_alone() -> None:
    graph = cute_animal_graphs.with_words(whole(), "一只小猫", 7)
    made = cute_animal_graphs.graph_of("stock", graph, texts)
    kinds = {key: item["class_type"] for key, item in made.items()}
    assert kinds == {
        **{"unet": "UNETLoader", "clip": "CLIPLoader", "vae": "VAELoader", "pos": "CLIPTextEncode"},
        **{"neg": "CLIPTextEncode", "steps": "PrimitiveInt", "latent": "EmptySD3LatentImage"},
        **{"sampler": "KSampler", "decode": "VAEDecode", "save": "SaveImage"},
    }
    assert made["unet"]["inputs"] == {"unet_name": "u", "weight_dtype": "default"}
    assert made["pos"]["inputs"] == {"clip": ["clip", 0], "text": "一只小猫, s, p"}
    assert made["neg"]["inputs"]["text"] == "nothing"
    sampler = made["sampler"]["inputs"]
    assert sampler["seed"] == 7 and sampler["steps"] == ["steps", 0] and "policy" not in sampler
    assert all("keep_nothing" in item["_meta"]["qwen_vram"] for item in made.values())
    assert whole()["box"]["inputs"]["value"] == "a cat"  # what was given is not changed


def test_our_side_draws_the_same_and_what_nobody_asks_for_is_not_in_it() -> None:
    made = cute_animal_graphs.graph_of("ours", whole(), texts)
    assert whole().keys() - made.keys() == {"page", "sheet", "save page", "save sheet", "clear"}
    assert cute_animal_graphs.graph_of("whole", whole(), texts) == whole()
    for side, weight_dtype in (("nf4", "bnb_nf4"), ("fp8", "fp8_e4m3fn"), ("merged", "default")):
        other = cute_animal_graphs.graph_of(side, whole(), texts)
        assert other.pop("unet")["inputs"].items() >= {"weight_dtype": weight_dtype}.items()
        assert other == {key: item for key, item in made.items() if key != "unet"}


def test_a_node_without_a_stock_counterpart_is_named() -> None:
    graph = whole()
    graph["unet"]["class_type"] = "QwenVRAMSomethingNew"
    with pytest.raises(ValueError, match="no stock node for QwenVRAMSomethingNew"):
        cute_animal_graphs.stock(graph, texts)


def test_the_weights_are_those_that_the_loader_says() -> None:
    facts = {"text": "t", "dtype": "bfloat16", "formats": {"int8": 3}, "why": "card", "bytes": 1}
    outputs = {"unet": {"qwen_vram": [facts]}, "save": {"images": []}}
    told = {"dtype": "bfloat16", "formats": {"int8": 3}, "why": "card"}
    assert cute_animal.taken(whole(), outputs) == told
    assert cute_animal.weights([{"weights": told}, {"weights": None}]) == "int8"
    assert cute_animal.taken(cute_animal_graphs.stock(whole(), texts), outputs) is None


def test_a_terminated_run_ends_by_an_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["x", "run", str(tmp_path), str(tmp_path / "out"), "--rehearse"]
    )
    monkeypatch.setattr(cute_animal, "run", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            cute_animal.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    """As of a rehearsal."""
    return Namespace(
        base=tmp_path, out=tmp_path / "out.jsonl", rehearse=True, side=["stock", "ours"], args=[],
        seconds=60.0, images=2, phase=list(cute_animal.PHASES), ram="whole",
    )  # fmt: skip


def test_it_goes_on_where_it_was_stopped_and_counts_no_picture_twice(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, str]] = []

    def session(_: Namespace, cell: dict[str, Any]):
        begun.append((cell["side"], cell["phase"]))
        for number, (kind, _, _) in enumerate(cute_animal.work(cell["phase"], 2)):
            if len(begun) == 2 and number == 1:
                raise KeyboardInterrupt  # in the second session's second picture
            yield {
                **cell, "number": number, "kind": kind, "status": "success", "seconds": 2.0,
                "started": 3.0, "vram": None, "ram": {"RssAnon": 10**9}, "encoder loaded": True,
                "pixels": f"{cell['phase']}{number}",
                "weights": {"dtype": "int8", "formats": {}, "why": "w"} if cell["side"] == "ours" else None,
            }  # fmt: skip
        yield {**cell, "end": True, "took": 10.0}

    monkeypatch.setattr(cute_animal, "session", session)
    monkeypatch.setattr(cute_animal, "prepared", lambda *_: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt):
        cute_animal.run(options)
    cute_animal.run(options)
    assert begun == [
        *[("stock", "first"), ("stock", "restart"), ("stock", "restart")],
        *[("ours", "first"), ("ours", "restart")],
    ]
    cute_animal.run(options)
    assert len(begun) == 5  # nothing is left to do
    rows = cute_animal.read(options.out)
    pictures = cute_animal.complete(rows)
    assert len(pictures) == 2 * (3 + 3) < sum("number" in row for row in rows)
    table = cute_animal.table(rows)
    assert (
        "| CPU, rehearsal | whole | ours | 6 of 6 | 5.0 (3.0 of it the start) | 2.00 | 2.00 |"
        in table
    )
    assert "| int8 |" in table and "| as stock loads them |" in table
    assert "not measurable" in table and table.endswith("pixel by pixel: 6 of 6.")


def test_a_machine_with_less_ram_is_another_one(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []

    @contextlib.contextmanager
    def small_ram(gib: float | None):
        limits.append(gib)
        yield ""

    def session(_: Namespace, cell: dict[str, Any]):
        yield {
            **cell, "number": 0, "kind": "new", "status": "success", "seconds": 2.0, "started": 3.0,
            "vram": None, "ram": {}, "encoder loaded": True,
        }  # fmt: skip
        yield {**cell, "end": True, "took": 1.0}

    monkeypatch.setattr(cute_animal, "small_ram", small_ram)
    monkeypatch.setattr(cute_animal, "session", session)
    monkeypatch.setattr(cute_animal, "prepared", lambda *_: contextlib.nullcontext())
    options.side, options.phase = ["ours"], ["first"]
    for options.ram in ("whole", "32 GB", "32 GB"):
        cute_animal.run(options)
    assert limits == [None, 30.0]
    table = cute_animal.table(cute_animal.read(options.out))
    assert "| whole | ours | 1 of 1 |" in table and "| 32 GB | ours | 1 of 1 |" in table


def test_no_session_begins_that_would_not_end_in_time(
    options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = {**cute_animal.cells(options)[0], "attempt": 1.0}
    options.out.write_text(json.dumps({**cell, "end": True, "took": 61.0}) + "\n")
    monkeypatch.setattr(cute_animal, "prepared", lambda *_: contextlib.nullcontext())
    cute_animal.run(options)
    assert "no time for another session" in capsys.readouterr().out
