"""The command line: the right file, or one sentence, an exit status and no file."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from pack.core import quantize_file, quantized_layers, quantized_writing
from pack.core.checkpoint import CheckpointError, read_header
from pack.core.layer_source import LayerSource
from pack.tests.conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FOLDER = ROOT / "demo" / "models"
TRANSFORMER = FOLDER / "diffusion_models" / "tiny_animals_edit.safetensors"
TEXT_ENCODER = FOLDER / "text_encoders" / "tiny_animals_text.safetensors"
VAE = FOLDER / "vae" / "tiny_animals_vae.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """The embedded transformer with two of its blocks."""
    state = load_file(TRANSFORMER)
    return {k: v for k, v in state.items() if k.split(".")[:2] not in DROPPED}


DROPPED = [["transformer_blocks", str(n)] for n in range(2, 6)]


@pytest.fixture(scope="module")
def source(plain, tmp_path_factory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    save_file(plain, path, {"qwen_vram": '{"axes_dims_rope": [4, 14, 14]}', "author": "me"})
    return path


def quantised(source: Path, *more: str, format: str = "bnb_int8") -> dict[str, torch.Tensor]:
    """What the command line makes of a file."""
    target = source.parent / "target.safetensors"
    given = [str(source), str(target), "--format", format, "--device", "cpu", *more]
    assert quantize_file.main(given) == 0
    try:
        return load_file(target)
    finally:
        target.unlink()


def test_layers_are_encoded_the_rest_is_copied_and_the_metadata_kept(source, plain) -> None:
    target = source.parent / "kept.safetensors"
    given = [str(source), str(target), "--format", "bnb_int8", "--device", "cpu"]
    assert quantize_file.main([*given, "--preset", "smallest"]) == 0
    state = load_file(target)
    layers = [k.removesuffix(".SCB") for k in state if k.endswith(".SCB")]
    assert len(layers) == 28 and all(n.startswith("transformer_blocks.") for n in layers)
    for layer in layers:
        for key, tensor in quantized_layers.encode(plain[f"{layer}.weight"], "bnb_int8").items():
            assert torch.equal(state.pop(f"{layer}.{key}"), tensor)
    assert state.keys() == {k for k in plain if k.removesuffix(".weight") not in layers}
    assert all(torch.equal(state[k], plain[k]) for k in state)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "me" and metadata["format"] == "pt"
    about = json.loads(metadata["qwen_vram"])
    assert about["axes_dims_rope"] == [4, 14, 14]
    assert about["quantization"]["layers"] == {"bnb_int8": 28}
    target.unlink()


def test_shards_and_all_in_one_files_give_the_same(source, plain, tmp_path) -> None:
    expected = quantised(source)
    names = sorted(plain)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({k: plain[k] for k in part}, tmp_path / f"model-{number:05}-of-00002.safetensors")
    whole = {f"model.diffusion_model.{k}": v for k, v in plain.items()}
    save_file({**whole, "vae.x": torch.ones(1)}, tmp_path / "whole.safetensors")
    for name in ("model-00001-of-00002", "whole"):
        state = quantised(tmp_path / f"{name}.safetensors")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in state)


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files_are_decoded_first(plain, tmp_path, scaled) -> None:
    state, decoded = dict(plain), dict(plain)
    for name, tensor in plain.items():
        if tensor.ndim == 2:
            scale = tensor.abs().max().float() / 448 if scaled else torch.tensor(1.0)
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            decoded[name] = (state[name].float() * scale).to(torch.bfloat16)
            if scaled:
                state[f"{name.removesuffix('weight')}scale_weight"] = scale.reshape(1)
    if scaled:
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "fp8.safetensors")
    save_file(decoded, tmp_path / "decoded.safetensors")
    ours, expected = (quantised(tmp_path / f"{n}.safetensors") for n in ("fp8", "decoded"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[k], expected[k]) for k in ours)


FP8 = torch.float8_e4m3fn
SCALES = {  # of an fp8 layer: what is unknown, and its shape beside a weight of this shape
    "weight_scale_inv": ((1, 1), (128, 128)),
    "weight_scale": ((1, 128), (128, 16)),
    "weight.scale": ((1,), (128, 16)),
    "scale_weight": ((1,), (128,)),
}


@pytest.mark.parametrize("name", SCALES)
def test_fp8_with_other_scales_is_refused(tmp_path, name) -> None:
    scale, shape = SCALES[name]
    state = {"a.weight": torch.ones(shape).to(FP8), f"a.{name}": torch.ones(scale)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"other.safetensors has a\.{name} .*use a file in b"
    ):
        LayerSource(read_header(str(tmp_path / "other.safetensors")))


def test_fp8_with_a_scale_for_each_row_is_decoded(tmp_path) -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    for scale in (rows, rows.view(-1)):
        state = {"a.weight": torch.ones(3, 8).to(FP8), "a.weight_scale": scale}
        save_file(state, tmp_path / "rows.safetensors")
        source = LayerSource(read_header(str(tmp_path / "rows.safetensors")))
        assert torch.equal(source.read("a.weight"), rows.expand(3, 8).bfloat16())


def test_reading_ahead_gives_the_same_tensors_in_the_same_order(source, plain) -> None:
    layers = LayerSource(read_header(str(source)))
    names = layers.names()
    assert sorted(names) == sorted(plain)
    ways = [layers._ahead(names, planned) for planned in (names, names[::2], names[1::3], [])]
    for stored in (layers.read_all(names), *ways):
        # A planned one lies in a buffer until the next one is asked for.
        found = [(name, tensor.clone()) for name, tensor in stored]
        assert [name for name, _ in found] == names
        assert all(torch.equal(tensor, plain[name]) for name, tensor in found)
    assert list(layers._ahead([], [])) == []


def test_what_was_written_is_not_held(source, tmp_path) -> None:
    kind, layers = quantized_writing.source_of(source)
    alive: list[weakref.ref] = []

    def steps():
        for _, tensor in layers.read_all(layers.names()):
            assert not [r for r in alive if r() is not None]
            alive.append(weakref.ref(tensor))
            yield {_: tensor}
            del tensor

    nothing = quantized_writing.Quantised("int8", "none", {}, {})
    told: list[tuple[int, int]] = []
    path = tmp_path / "copy.safetensors"
    size = quantized_writing.write_quantised(
        path, layers, nothing, steps(), lambda *t: told.append(t)
    )
    assert len(told) == len(alive) > 10 and told[-1][1] == size == path.stat().st_size
    assert load_file(path).keys() == load_file(source).keys()


def test_the_list_shows_the_size_of_the_file_that_comes_out(source, capsys) -> None:
    assert quantize_file.main([str(source), "--list"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("small.safetensors: a Qwen-Image diffusion model, ")
    known = quantize_file._presets(None)["diffusion_models"]
    assert all(said.count(preset.title) == 1 for preset in known.values())
    rows = {line.split()[0]: line for line in lines if line.startswith("  ") and line.strip()}
    assert rows.keys() == {*known, *quantize_file.ABOUT}
    _, options = quantized_writing.source_of(source)
    plans = [quantize_file.quantization.plan(options.layers, "w4a8", p) for p in known.values()]
    sizes = [quantize_file.planned_bytes(options, plan) for plan in plans]
    shown = [word for size in sizes for word in quantize_file.size_text(size).split()]
    assert rows["w4a8"].split()[1 : 1 + len(shown)] == shown and list(known)[0] == "balanced"
    target = source.parent / "size.safetensors"
    quantize_file.main([str(source), str(target), "--format", "w4a8", "--device", "cpu"])
    assert sizes[0] < target.stat().st_size < sizes[0] + 8 + 40_000
    target.unlink()


@pytest.mark.parametrize("card, taken", [(None, "w4a8"), ((7, 5), "w4a4"), ((8, 6), "w4a8")])
def test_int4_is_what_suits_the_device(source, monkeypatch, capsys, card, taken) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    cuda = quantize_file._capability(torch.device("cuda"))
    assert cuda == card and quantize_file._capability(torch.device("cpu")) is None
    monkeypatch.setattr(quantize_file, "_capability", lambda device: card)
    asked: list[str] = []
    monkeypatch.setattr(quantize_file, "quantise", lambda *given: asked.append(given[2]) or 1)
    target = source.parent / "int4.safetensors"
    assert quantize_file.main([str(source), str(target), "--format", "int4"]) == 0
    assert asked == [taken] and f", {taken}, in " in capsys.readouterr().err


def test_the_help_says_what_each_format_is_and_wrong_usage_has_status_2(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        quantize_file.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "\nexit status:\n  0; 1 after" in said
    assert set(quantize_file.ABOUT) == {*quantize_file.FORMATS, "int4"}
    assert all(f"\n  {name:9} {about}\n" in said for name, about in quantize_file.ABOUT.items())
    with pytest.raises(SystemExit) as ended:
        quantize_file.main(["a", "b", "--format", "int3"])
    assert ended.value.code == 2


def test_presets_of_ones_own(source, plain, tmp_path) -> None:
    mine = {
        "diffusion_models": {
            "mine": {"title": "", "rules": [["*.attn.to_q", "main"], ["*", "keep"]]}
        }
    }
    (tmp_path / "presets.json").write_text(json.dumps(mine), encoding="utf-8-sig")
    own = ("--preset", "mine", "--presets", str(tmp_path / "presets.json"))
    state = quantised(source, *own)
    assert {k.removesuffix(".SCB") for k in state if k.endswith(".SCB")} == {
        LAYER,
        LAYER.replace("0", "1"),
    }


SENTENCES = {
    "no format": (
        ["S", "T"],
        "Say --format, one of bnb_int8, bnb_nf4, bnb_fp4, int8, w4a8, w4a4, ",
    ),
    "no target": (["S", "--format", "int8"], "Say the TARGET, the .safetensors file to write"),
    "no preset": (
        ["S", "T", "--format", "int8", "--preset", "x"],
        "There is no preset x; there is ",
    ),
    "ending": (["S", "a.gguf", "--format", "int8"], "a.gguf must end with .safetensors"),
    "folder": (["S", "nowhere/t.safetensors", "--format", "int8"], "There is no folder nowhere"),
    "exists": (
        ["S", "S", "--format", "int8"],
        "exists and is not overwritten; choose another name",
    ),
    "kind": (["VAE", "T", "--format", "int8"], "is a Qwen-Image (Wan 2.1) VAE; what can be quant"),
    "missing": (
        ["nothing.safetensors", "T", "--format", "int8"],
        "nothing.safetensors: No such fi",
    ),
    "half": (["HALF", "T", "--format", "int8"], "half.safetensors is incomplete"),
    "not a number": (
        ["NAN", "T", "--format", "int8"],
        f"nan.safetensors, layer {LAYER}: The weight holds",
    ),
    "quantised": (
        ["PACKED", "T", "--format", "int8"],
        "packed.safetensors is quantised already (bnb_",
    ),
    "device": (
        ["S", "T", "--format", "int8", "--device", "cuda:99"],
        "This machine has no device cuda",
    ),
    "meta": (
        ["S", "T", "--format", "int8", "--device", "meta"],
        "This machine has no device meta (",
    ),
    "gbk": (["S", "--list", "--presets", "GBK"], "gbk.safetensors cannot be read: 'utf-8' codec"),
    "presets": (["S", "T", "--format", "int8", "--presets", "BROKEN"], "is not a list of presets"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_wrong_input_gets_a_sentence_and_status_1(source, plain, tmp_path, capsys, case) -> None:
    given, says = SENTENCES[case]
    names = {"S": source, "T": tmp_path / "t.safetensors", "VAE": VAE}
    names |= {n: tmp_path / f"{n.lower()}.safetensors" for n in ("HALF", "NAN", "PACKED", "BROKEN")}
    names["HALF"].write_bytes(source.read_bytes()[:100_000])
    names["GBK"] = tmp_path / "gbk.safetensors"
    names["GBK"].write_text("中文", encoding="gbk")
    names["BROKEN"].write_text("[]", encoding="utf-8")
    save_file({**plain, f"{LAYER}.weight": plain[f"{LAYER}.weight"] * torch.nan}, names["NAN"])
    packed = {
        f"{LAYER}.{k}": v
        for k, v in quantized_layers.encode(plain[f"{LAYER}.weight"], "bnb_int8").items()
    }
    save_file({**plain, **packed}, names["PACKED"])
    before = sorted(tmp_path.iterdir())
    assert quantize_file.main([str(names.get(g, g)) for g in given]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_format_whose_package_is_missing(source, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(quantized_layers, "missing_package", lambda format: f"{format}: get it.")
    target = tmp_path / "t.safetensors"
    assert quantize_file.main([str(source), str(target), "--format", "bnb_nf4"]) == 1
    assert capsys.readouterr().err in WHY and not target.exists()


def test_the_list_names_packages_that_are_missing_without_an_import(
    source, capsys, monkeypatch
) -> None:
    def imported(format: str) -> str:
        raise AssertionError("it takes seconds")

    monkeypatch.setattr(quantized_layers, "missing_package", imported)
    monkeypatch.setattr(quantize_file, "find_spec", lambda name: None)
    assert quantize_file.main([str(source), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package, formats in (("bitsandbytes", "bnb_nf4 bnb_fp4"), ("comfy-kitchen", "w4a8 w4a4")):
        for format in formats.split():
            line = next(line for line in lines if line.startswith(f"  {format} "))
            assert line.endswith(f"; first `pip install {package}`")
    assert not any("bnb_int8" in line and "pip" in line for line in lines)


@pytest.mark.parametrize("lacking", [False, True])
def test_bitsandbytes_formats_of_an_encoder_do_without_comfy_kitchen(
    tmp_path, capsys, monkeypatch, lacking
) -> None:
    state = load_file(TEXT_ENCODER)
    table = "model.embed_tokens.weight"
    state[table] = torch.ones(8, state["model.norm.weight"].numel(), dtype=torch.bfloat16)
    save_file(state, tmp_path / "text.safetensors", {"qwen_vram": '{"vision_heads": 2}'})
    if lacking:
        monkeypatch.setattr(
            quantized_layers,
            "missing_package",
            lambda f: f"{f}: get it." if f == "int8" else "",
        )
        monkeypatch.setattr(quantize_file, "find_spec", lambda name: name == "bitsandbytes" or None)
    made = quantised(tmp_path / "text.safetensors")
    assert (made[table].dtype == torch.bfloat16) == lacking
    assert ("table of words stays as it is: int8: get it.\n" in capsys.readouterr().err) == lacking
    assert quantize_file.main([str(tmp_path / "text.safetensors"), "--list"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  bnb_")]
    assert [line.endswith(quantize_file.WORDS) for line in rows] == [lacking] * 3


def test_float64_is_quantised_as_float32(source, plain, tmp_path) -> None:
    made = []
    for dtype in (torch.float32, torch.float64):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in plain.items()}, path)
        made.append(quantised(path))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])


WHY = ("bnb_int8: get it.\n", "bnb_nf4: get it.\n")


def test_an_interrupt_leaves_no_file_and_gives_status_130(source, tmp_path, monkeypatch) -> None:
    def interrupted(self, done: int, total: int) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_file._Progress, "__call__", interrupted)
    given = [str(source), str(tmp_path / "t.safetensors"), "--format", "bnb_int8"]
    assert quantize_file.main([*given, "--device", "cpu"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_it_runs_from_the_folder_of_the_pack_without_comfyui(tmp_path) -> None:
    target = tmp_path / "text.safetensors"
    given = [str(TEXT_ENCODER), str(target), "--format", "bnb_int8", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "core.quantize_file", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert run.stderr.startswith(f"{target}: 0.4 MB, bnb_int8, in ")
    hints = read_header(str(target)).hints()
    assert hints["vocabulary"] == "sign_codes" and "quantization" in hints
    assert "model.embed_tokens.weight" not in load_file(target)
