"""What was quantised is written, opens again as it was, and opens where others open it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.core import quantize_file
from pack.core.checkpoint import read_header
from pack.core.layer_source import LayerSource
from pack.core.quantization import plan, presets
from pack.core.units import size_text
from pack.demo.embedded import TEXT_ENCODER, TRANSFORMER
from pack.tests.graphs import CLIP, UNET, embedded_text_to_image, keeping_nothing, loader, node
from pack.tests.host import RunError
from pack.tests.nodes.quantized_models import write_lora
from safetensors import safe_open
from safetensors.torch import load_file

EMBEDDED = {
    "DiffusionModel": TRANSFORMER.rpartition("/")[2],
    "TextEncoder": TEXT_ENCODER.rpartition("/")[2],
}
INPUTS = {"DiffusionModel": "model", "TextEncoder": "clip"}
FOLDERS = ("diffusion_models", "clip")
OURS = {"int4": "w4a8"}  # what the loader makes of it on a CPU


@pytest.fixture
def saving(fresh) -> Iterator:
    """The host, which looks for models in its output folder too, as its main.py tells it."""
    folders = fresh.folder_paths
    output = Path(folders.get_output_directory())
    known = {name: list(folders.get_folder_paths(name)) for name in FOLDERS}
    for name in known:
        folders.add_model_folder_path(name, str(output / name))
    yield fresh
    for name, before in known.items():
        folders.get_folder_paths(name)[:] = before
        for file in (output / name).rglob("*.*"):
            file.unlink()


def saving_graph(kind: str, format: str, prefix: str = "x", **more: Any) -> dict[str, Any]:
    """A loader and Save Quantized Model."""
    file = more.pop("file", EMBEDDED[kind])
    wire = {INPUTS[kind]: ["load", 0]}
    return {
        "load": loader(kind, file, weight_dtype=format, **more),
        "save": node("QwenVRAMSaveQuantized", filename_prefix=prefix, **wire),
    }


def saved(host, *given: str, **more: Any) -> Path:
    """The file that they write."""
    return Path(host.run(saving_graph(*given, **more)).status("save")["files"][0]["path"])


def sentence(host, graph: dict[str, Any]) -> str:
    """What the user reads, after which no file may be there."""
    with pytest.raises(RunError) as error:
        host.run(graph)
    output = Path(host.folder_paths.get_output_directory())
    assert not [p for name in FOLDERS for p in (output / name).rglob("*") if p.is_file()]
    return str(error.value).strip()


def test_the_model_that_is_loaded_from_the_file_draws_the_same_picture(saving) -> None:
    graph = keeping_nothing(embedded_text_to_image("a red bunny", width=128, height=128))
    graph["sampler"]["inputs"]["steps"] = 2
    graph["unet"]["inputs"]["weight_dtype"] = graph["clip"]["inputs"]["weight_dtype"] = "bnb_nf4"
    graph["write"] = node(
        "QwenVRAMSaveQuantized", model=["unet", 0], clip=["clip", 0], filename_prefix="a/%format%"
    )
    first = saving.run(graph)
    files = [Path(file["path"]) for file in first.status("write")["files"]]
    assert [f"{f.parents[1].name}/{f.parent.name}/{f.name}" for f in files] == [
        "diffusion_models/a/bnb_nf4_00001_.safetensors",
        "clip/a/bnb_nf4_00001_.safetensors",
    ]
    del graph["write"]
    graph["unet"]["inputs"].update(unet_name="a/" + files[0].name, weight_dtype="default")
    graph["clip"]["inputs"].update(clip_name="a/" + files[1].name, weight_dtype="default")
    saving.forget_everything()
    again = saving.run(graph)
    assert torch.equal(first.outputs["decode"][0][0], again.outputs["decode"][0][0])
    assert again.status("unet")["formats"] == first.status("unet")["formats"] != {}
    assert again.status("clip")["formats"] == first.status("clip")["formats"] != {}


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("DiffusionModel", "bnb_nf4"),
        ("DiffusionModel", "int8"),
        ("DiffusionModel", "int4"),
        ("TextEncoder", "bnb_fp4"),
        ("TextEncoder", "bnb_int8"),
    ],
)
def test_the_command_line_writes_the_same_file_and_saving_twice_does_too(
    saving, kind: str, format: str, tmp_path
) -> None:
    name = {"DiffusionModel": UNET, "TextEncoder": CLIP}[kind]
    graph, source = saving_graph(kind, format, file=name), next(saving.models.rglob(name))
    graph["again"] = {**graph["save"], "inputs": {**graph["save"]["inputs"]}}
    graph["again"]["inputs"]["filename_prefix"] = "y"
    run, target = saving.run(graph), tmp_path / "theirs.safetensors"
    given = ["--format", OURS.get(format, format), "--device", "cpu"]
    assert quantize_file.main([str(source), str(target), *given]) == 0
    for name in ("save", "again"):
        shown = run.status(name)["files"][0]
        assert Path(shown["path"]).read_bytes() == target.read_bytes()
        assert shown["bytes"] == target.stat().st_size < source.stat().st_size


def test_the_status_line_and_the_metadata_say_what_is_in_the_file(saving) -> None:
    graph = saving_graph("DiffusionModel", "bnb_nf4", "%source%-%format%", preset="balanced")
    run, path = saving.run(graph), next(saving.models.rglob(EMBEDDED["DiffusionModel"]))
    layers = LayerSource(read_header(str(path))).layers
    planned = Counter(plan(layers, "bnb_nf4", presets()["diffusion_models"]["balanced"]).values())
    assert len(planned) == 2
    shown = run.status("save")
    name = f"{EMBEDDED['DiffusionModel'].removesuffix('.safetensors')}-bnb_nf4_00001_.safetensors"
    size, formats, place, seconds = shown["text"].split(" · ")
    assert formats == ", ".join(f"{n} layers {f}" for f, n in sorted(planned.items()))
    assert f" · {formats} · " in run.status("load")["text"]
    assert place == f"output/diffusion_models/{name}"
    assert size == size_text(Path(shown["files"][0]["path"]).stat().st_size)
    assert seconds.startswith("written in ")
    with safe_open(shown["files"][0]["path"], "pt") as file:
        about = json.loads(file.metadata()["qwen_vram"])
    with safe_open(path, "pt") as file:
        before = json.loads(file.metadata().get("qwen_vram", "{}"))
    assert about == {
        **before,
        "quantization": {
            "format": "bnb_nf4",
            "preset": "balanced",
            "source": EMBEDDED["DiffusionModel"],
            "layers": dict(planned),
            "version": 1,
        },
    }


def test_loras_and_what_they_left_in_memory_are_not_in_the_file_and_the_node_says_so(
    saving,
) -> None:
    plain = saved(saving, "DiffusionModel", "int8", file=UNET)
    graph = saving_graph("DiffusionModel", "int8", "with", file=UNET)
    write_lora(
        saving,
        "both.safetensors",
        {"transformer_blocks.0.attn.to_q": (128, 128), "img_in": (128, 64)},
    )
    graph["lora"] = node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name="both.safetensors", strength_model=1.0
    )
    graph["save"]["inputs"]["model"] = ["lora", 0]
    model = saving.run(
        {k: graph[k] for k in ("load", "lora")} | {"out": node("PreviewAny", source=["lora", 0])}
    ).outputs["lora"][0][0]
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    assert model.backup  # ComfyUI has patched img_in
    shown = saving.run(graph).status("save")
    assert "not in the file: 1 LoRA added at run time" in shown["text"]
    assert shown["text"].endswith("; 1 patches of other weights")
    assert Path(shown["files"][0]["path"]).read_bytes() == plain.read_bytes()
    comfy.model_management.unload_all_models()


def test_bitsandbytes_itself_opens_the_layers(saving) -> None:
    import bitsandbytes

    entries = load_file(saved(saving, "DiffusionModel", "bnb_nf4"))
    layer = "transformer_blocks.0.attn.to_q.weight"
    stats = {k: v for k, v in entries.items() if k.startswith(f"{layer}.")}
    opened = bitsandbytes.nn.Params4bit.from_prequantized(
        entries[layer], stats, requires_grad=False, device="cpu"
    )
    weight = load_file(next(saving.models.rglob(EMBEDDED["DiffusionModel"])))[layer]
    values = bitsandbytes.functional.dequantize_4bit(opened.data, opened.quant_state)
    assert values.dtype == weight.dtype and values.shape == weight.shape
    error = (values.float() - weight.float()).norm() / weight.float().norm()
    assert 0.02 < error < 0.15


class TestWrongInput:
    """A sentence each, and no file."""

    def test_nothing_is_connected(self, saving) -> None:
        graph = {"save": node("QwenVRAMSaveQuantized", filename_prefix="x")}
        assert sentence(saving, graph) == "Nothing is connected: connect model, clip or both."

    @pytest.mark.parametrize("kind", EMBEDDED)
    def test_a_model_that_is_not_quantised(self, saving, kind) -> None:
        said = sentence(saving, saving_graph(kind, "default"))
        assert said.startswith(f"{EMBEDDED[kind]} was not quantised when it was loaded; choose a")

    def test_a_model_from_another_loader(self, saving) -> None:
        module = saving.part("nodes.save_quantized")
        patcher = saving.run(
            {"load": loader("DiffusionModel", UNET), "out": node("PreviewAny", source=["load", 0])}
        ).outputs["load"][0][0]
        patcher.cached_patcher_init = None
        with pytest.raises(ValueError, match="model does not come from a loader of Qwen VRAM; cho"):
            module.origin_of("model", patcher)

    def test_a_file_that_is_quantised_already(self, saving) -> None:
        path = saved(saving, "DiffusionModel", "bnb_nf4")
        target = saving.models / "diffusion_models" / "packed.safetensors"
        shutil.move(path, target)
        for format in ("default", "bnb_nf4"):
            graph = saving_graph("DiffusionModel", format, file=target.name)
            said = "packed.safetensors is a quantised file already; use it as it is."
            assert sentence(saving, graph) == said
        target.unlink()

    @pytest.mark.parametrize("prefix", ["../x", "/x", "", "a/../../x", "a\0b"])
    def test_a_place_outside_of_the_folder(self, saving, prefix) -> None:
        said = sentence(saving, saving_graph("DiffusionModel", "bnb_nf4", prefix))
        assert said.startswith("filename_prefix must be a name, or folders and a name, not")

    @pytest.mark.parametrize(
        ("happens", "says"),
        [
            ("gone", "is needed for what stays as it is, and cannot be read"),
            ("changed", "changed after it was loaded; load it again, then save."),
        ],
    )
    def test_the_source_is_gone_or_another_one(self, saving, happens, says) -> None:
        source = saving.models / "diffusion_models" / "source.safetensors"
        shutil.copy(saving.models / "diffusion_models" / UNET, source)
        graph = saving_graph("DiffusionModel", "bnb_nf4", file=source.name)
        load = {"load": graph["load"], "out": node("PreviewAny", source=["load", 0])}
        patcher = saving.run(load).outputs["load"][0][0]
        if happens == "gone":
            source.unlink()
        else:
            source.write_bytes(source.read_bytes()[:-1] + b"x")
        module = saving.part("nodes.save_quantized")
        with pytest.raises(ValueError, match=says):
            module.save("model", patcher, patcher.model.diffusion_model, "x")
        source.unlink(missing_ok=True)

    def test_a_merge_is_not_lost_silently(self, saving) -> None:
        graph = saving_graph("DiffusionModel", "bnb_nf4", file=UNET)
        graph["other"] = loader("DiffusionModel", UNET)
        merge = {"model1": ["load", 0], "model2": ["other", 0], "ratio": 0.5}
        graph["merge"] = node("ModelMergeSimple", **merge)
        graph["save"]["inputs"]["model"] = ["merge", 0]
        said = sentence(saving, graph)
        assert said.startswith("What was merged or patched into model cannot be written (")

    def test_an_interrupt_and_a_full_disk_leave_nothing(self, saving, monkeypatch) -> None:
        import comfy.model_management as management

        module = saving.part("core.tensor_writer")
        graph = saving_graph("DiffusionModel", "bnb_nf4")
        load = {"load": graph["load"], "out": node("PreviewAny", source=["load", 0])}
        patcher = saving.run(load).outputs["load"][0][0]
        write = module.TensorWriter.write

        def interrupted(*given: Any) -> None:
            write(*given)
            management.interrupt_current_processing()

        monkeypatch.setattr(module.TensorWriter, "write", interrupted)
        with pytest.raises(RunError):
            saving.run(graph)
        output = Path(saving.folder_paths.get_output_directory())
        assert not [p for p in (output / "diffusion_models").iterdir() if p.is_file()]
        monkeypatch.undo()
        usage = shutil.disk_usage(output)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        assert " MB, and the disk of" in sentence(saving, graph)
        assert patcher is not None
