"""One set of weights per file, real ComfyUI objects, and a sentence for every wrong file."""

from __future__ import annotations

import gc
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from pack.tests.graphs import (
    CLIP,
    LORA,
    UNET,
    VAE,
    encode,
    loader,
    node,
    preview,
    text_to_image,
)
from pack.tests.host import RunError
from pack.tests.links import symlink
from safetensors.torch import load_file, save_file

KINDS = {"DiffusionModel": UNET, "TextEncoder": CLIP, "VAE": VAE}
FOLDERS = {"DiffusionModel": "diffusion_models", "TextEncoder": "text_encoders", "VAE": "vae"}


def patcher(output):
    """The ModelPatcher behind a MODEL, CLIP or VAE."""
    return getattr(output, "patcher", output)


def storages(model: torch.nn.Module) -> set[int]:
    """Addresses of the memory that holds a model's weights."""
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def load(host, kind: str, name: str | None = None, **options):
    """Run one loader; returns its output and what it showed."""
    graph = {
        "load": loader(kind, name or KINDS[kind], **options),
        "out": node("PreviewAny", source=["load", 0]),
    }
    run = host.run(graph)
    return run.outputs["load"][0][0], run.ui.get("load", {}).get("qwen_vram", [{}])[0]


def live_weights(host, name: str) -> int:
    """How many sets of weights of this class are in memory: none was when objects were frozen."""
    gc.collect()
    return sum(type(o).__name__ == name for o in gc.get_objects() if isinstance(o, torch.nn.Module))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("DiffusionModel", "QwenImageTransformer2DModel"),
        ("TextEncoder", "Llama2_"),
        ("VAE", "WanVAE"),
    ],
)
def test_two_nodes_another_workflow_and_a_link_hold_one_set_of_weights(
    fresh, kind, weights
) -> None:
    folder = fresh.models / FOLDERS[kind]
    (folder / "link.safetensors").unlink(missing_ok=True)
    symlink(folder / "link.safetensors", folder / KINDS[kind])
    graph = {
        "a": loader(kind, KINDS[kind]),
        "b": loader(kind, KINDS[kind], keep_loaded=True),  # another cache key for the host
        "c": loader(kind, "link.safetensors"),
        **{f"out{n}": node("PreviewAny", source=[n, 0]) for n in "abc"},
    }
    run = fresh.run(graph)
    a, b, c = (run.outputs[n][0][0] for n in "abc")
    assert storages(patcher(a).model) == storages(patcher(b).model) == storages(patcher(c).model)
    assert len({id(a), id(b), id(c)}) == 3
    fresh.restart()  # the workflow was closed; another one opens
    again, shown = load(fresh, kind)
    assert storages(patcher(again).model) == storages(patcher(a).model)
    assert shown["reused"] and shown["holders"] >= 2
    assert live_weights(fresh, weights) == 1
    (folder / "link.safetensors").unlink()


def test_the_node_shows_size_dtype_device_sharing_and_seconds(fresh) -> None:
    _, shown = load(fresh, "DiffusionModel")
    size = sum(p.numel() * p.element_size() for p in _.model.parameters())
    assert shown["bytes"] >= size > 1_000_000
    assert shown["dtype"] == "fp32" and shown["device"] == "cpu" and shown["holders"] == 1
    assert shown["text"].startswith(
        f"{shown['bytes'] / 1e6:.1f} MB · fp32 · cpu · not shared · loaded in "
    )


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("DiffusionModel", "QwenImageTransformer2DModel"),
        ("TextEncoder", "Llama2_"),
        ("VAE", "WanVAE"),
    ],
)
def test_unused_models_are_gone_and_kept_ones_stay_until_released(fresh, kind, weights) -> None:
    load(fresh, kind, keep_loaded=True)
    fresh.restart()
    assert live_weights(fresh, weights) == 1
    assert load(fresh, kind)[1]["reused"]
    fresh.restart()
    assert live_weights(fresh, weights) == 0


def test_keeping_ends_when_it_is_switched_off_although_the_loader_does_not_run(fresh) -> None:
    graph = {
        "clip": loader("TextEncoder", CLIP, keep_loaded=True),
        "e": encode("x"),
        **preview("e"),
    }
    fresh.run(graph)
    fresh.restart()
    assert live_weights(fresh, "Llama2_") == 1
    graph["clip"]["inputs"]["keep_loaded"] = False
    run = fresh.run(graph)
    assert "clip" not in run.executed
    fresh.restart()
    assert live_weights(fresh, "Llama2_") == 0


def test_another_loader_of_the_file_does_not_end_keeping(fresh) -> None:
    load(fresh, "VAE", keep_loaded=True)
    fresh.restart()
    fresh.run({"other": loader("VAE", VAE), "out": node("PreviewAny", source=["other", 0])})
    fresh.restart()
    assert live_weights(fresh, "WanVAE") == 1


def test_fp8_fast_computes_in_fp8_and_plain_fp8_does_not(fresh) -> None:
    for option in ("fp8_e4m3fn", "fp8_e4m3fn_fast"):
        output, _ = load(fresh, "DiffusionModel", weight_dtype=option)
        assert output.model.model_config.optimizations["fp8"] is (option == "fp8_e4m3fn_fast")


def test_a_device_that_is_not_there_gets_a_sentence(fresh) -> None:
    with pytest.raises(ValueError, match="This machine has no device gpu:7"):
        fresh.part("nodes.architectures").resolve_device("gpu:7")


def test_a_file_that_changes_while_it_is_read_is_not_shared(fresh, monkeypatch) -> None:
    architectures = fresh.part("nodes.architectures")
    read, path = architectures.load_vae, fresh.models / "vae" / VAE

    def touching(*args):
        os.utime(path)
        return read(*args)

    monkeypatch.setattr(architectures, "load_vae", touching)
    with pytest.raises(RunError, match="changed while it was read; run again"):
        load(fresh, "VAE")


def test_a_clone_alone_keeps_the_weights_shared(fresh) -> None:
    clip, _ = load(fresh, "TextEncoder")
    clone = clip.clone()
    addresses = storages(patcher(clip).model)
    del clip
    fresh.restart()
    again, shown = load(fresh, "TextEncoder")
    assert shown["reused"] and storages(patcher(again).model) == addresses
    assert again.tokenize("a")["qwen25_7b"] == clone.tokenize("a")["qwen25_7b"]


def test_settings_of_one_handle_do_not_reach_another(fresh) -> None:
    first, _ = load(fresh, "TextEncoder")
    first.clip_layer(-2)
    first.set_tokenizer_option("min_length", 99)
    first.patcher.model_options["mine"] = True
    fresh.restart()
    second, _ = load(fresh, "TextEncoder")
    assert second.layer_idx is None and second.tokenizer_options == {}
    assert "mine" not in second.patcher.model_options


def test_a_replaced_file_is_a_new_model_at_once(fresh) -> None:
    target = fresh.models / "diffusion_models" / "replaced.safetensors"
    shutil.copy(fresh.models / "diffusion_models" / UNET, target)
    old, _ = load(fresh, "DiffusionModel", target.name, keep_loaded=True)
    sd = load_file(target)
    sd["img_in.bias"] += 1
    save_file(sd, target)
    new, shown = load(fresh, "DiffusionModel", target.name, keep_loaded=True)
    assert not shown["reused"] and not storages(new.model) & storages(old.model)
    kept = fresh.part("nodes.loaders").REGISTRY.kept()
    assert [k.file.mtime_ns for k in kept] == [target.stat().st_mtime_ns]
    target.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_factories_give_fresh_weights_past_the_registry(fresh, kind) -> None:
    output, _ = load(fresh, kind)
    factory, arguments, *rest = patcher(output).cached_patcher_init
    other = factory(*arguments, disable_dynamic=True)
    assert not rest and not storages(other.model) & storages(patcher(output).model)
    pairs = zip(other.model.parameters(), patcher(output).model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    deep = patcher(output).deepclone_multigpu(torch.device("cpu"))
    assert not storages(deep.model) & storages(patcher(output).model)


@pytest.mark.parametrize(
    ("kind", "option", "dtype"),
    [
        ("DiffusionModel", "bf16", torch.bfloat16),
        ("DiffusionModel", "fp16", torch.float16),
        ("DiffusionModel", "fp32", torch.float32),
        ("DiffusionModel", "fp8_e4m3fn", torch.float8_e4m3fn),
        ("DiffusionModel", "fp8_e4m3fn_fast", torch.float8_e4m3fn),
        ("DiffusionModel", "fp8_e5m2", torch.float8_e5m2),
        ("TextEncoder", "fp16", torch.float16),
        ("TextEncoder", "fp32", torch.float32),
        ("TextEncoder", "fp8_e4m3fn", torch.float8_e4m3fn),
        ("VAE", "fp16", torch.float16),
        ("VAE", "fp32", torch.float32),
    ],
)
def test_weight_dtype_is_what_the_weights_have(fresh, kind, option, dtype) -> None:
    output, shown = load(fresh, kind, weight_dtype=option, device="cpu")
    assert max((p.numel(), p.dtype) for p in patcher(output).model.parameters())[1] == dtype
    assert shown["dtype"] == option.removesuffix("_fast")
    assert patcher(output).load_device == torch.device("cpu")


def test_an_unknown_device_is_refused_before_anything_is_read(fresh) -> None:
    with pytest.raises(RunError) as refused:
        load(fresh, "VAE", device="gpu:7")
    assert "gpu:7" in str(refused.value.details)


def test_lora_sampling_patches_and_stock_samplers_work_behind_our_loaders(fresh) -> None:
    graph = text_to_image()
    plain = fresh.run(graph).outputs["decode"][0][0]
    graph["lora"] = node(
        "LoraLoaderModelOnly", model=["unet", 0], lora_name=LORA, strength_model=1.0
    )
    graph["shift"]["inputs"]["model"] = ["lora", 0]
    with_lora = fresh.run(graph).outputs["decode"][0][0]
    assert (with_lora - plain).abs().mean() > 0.01
    graph["shift"]["inputs"]["model"] = ["unet", 0]
    fresh.restart()  # the LoRA leaves no trace on the shared weights
    assert torch.equal(fresh.run(graph).outputs["decode"][0][0], plain)


class TestWrongFiles:
    """Each gives one sentence that names the file, what it is and what was expected."""

    def sentence(self, host, kind: str, name: str) -> str:
        """What the user reads."""
        with pytest.raises(RunError) as error:
            load(host, kind, name)
        return str(error.value)

    @pytest.mark.parametrize(
        ("kind", "source", "says"),
        [
            (
                "DiffusionModel",
                f"vae/{VAE}",
                "is a Qwen-Image (Wan 2.1) VAE, and this node needs a Qwen-Image diffusion model: put "
                "it into models/vae and choose it in Load VAE (Qwen VRAM).",
            ),
            (
                "DiffusionModel",
                f"loras/{LORA}",
                "is a LoRA, and this node needs a Qwen-Image diffusion model: put it into models/loras "
                "and choose it in Load LoRA, behind a diffusion model.",
            ),
            (
                "TextEncoder",
                f"diffusion_models/{UNET}",
                "is a Qwen-Image diffusion model, and this node needs a Qwen2.5-VL text encoder: put "
                "it into models/diffusion_models and choose it in Load Diffusion Model (Qwen VRAM).",
            ),
            (
                "VAE",
                f"text_encoders/{CLIP}",
                "is a Qwen2.5-VL text encoder, and this node needs a Qwen-Image (Wan 2.1) VAE: put "
                "it into models/text_encoders and choose it in Load Text Encoder (Qwen VRAM).",
            ),
        ],
    )
    def test_another_kind_of_file(self, fresh, kind, source, says) -> None:
        wrong = fresh.models / FOLDERS[kind] / "wrong.safetensors"
        shutil.copy(fresh.models / source, wrong)
        assert self.sentence(fresh, kind, wrong.name).strip() == f"wrong.safetensors {says}"
        wrong.unlink()

    def test_an_sdxl_checkpoint(self, fresh) -> None:
        wrong = fresh.models / "diffusion_models" / "sdxl.safetensors"
        save_file({"conditioner.embedders.1.model.ln_final.weight": torch.ones(3)}, wrong)
        assert self.sentence(fresh, "DiffusionModel", wrong.name).startswith(
            "sdxl.safetensors is an SDXL checkpoint, and this node needs"
        )
        wrong.unlink()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_truncated_file(self, fresh, kind) -> None:
        wrong = fresh.models / FOLDERS[kind] / "short.safetensors"
        whole = (fresh.models / FOLDERS[kind] / KINDS[kind]).read_bytes()
        wrong.write_bytes(whole[: len(whole) // 2])
        message = self.sentence(fresh, kind, wrong.name)
        assert message.startswith("short.safetensors is incomplete") and message.strip().endswith(
            "download it again."
        )
        wrong.unlink()

    def test_a_missing_file_is_refused_by_validation_and_by_the_loader(self, fresh) -> None:
        with pytest.raises(RunError) as refused:
            load(fresh, "VAE", "nothing.safetensors")
        assert "nothing.safetensors" in str(refused.value.details)
        with pytest.raises(
            ValueError, match=r"nothing\.safetensors is not in models/vae; put it there"
        ):
            fresh.part("nodes.loaders").resolve("vae", "nothing.safetensors")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("there", [False, True], ids=["absent", "there"])
    def test_a_graph_that_names_a_gguf_file(self, fresh, kind, there) -> None:
        """Typed or from another's workflow, or linked: no list has it, and the loader says why."""
        wrong = fresh.models / FOLDERS[kind] / "Qwen-Q4.GGUF"
        if there:
            wrong.write_bytes(b"GGUF")
        graph = {
            "name": node("TestJoined", a="Qwen-Q4", b=".GGUF"),
            "out": node("PreviewAny", source=["load", 0]),
        }
        for value in (wrong.name, ["name", 0]):
            graph["load"] = loader(kind, value)
            with pytest.raises(RunError) as refused:
                fresh.run(graph)
            said = refused.value.details["exception_message"]
            assert said.startswith(f"{wrong.name} is a GGUF file, which Qwen VRAM does not open")
            if kind == "VAE":  # no loader of ComfyUI-GGUF opens one
                assert said.strip().endswith(
                    ": take the VAE as a .safetensors file, such as qwen_image_vae.safetensors."
                )
            else:
                assert "loaders of ComfyUI-GGUF" in said
        wrong.unlink(missing_ok=True)

    def test_files_that_need_pickle_are_not_offered(self, fresh) -> None:
        (fresh.models / "vae" / "old.pt").write_bytes(b"x")
        time.sleep(0.01)
        os.utime(fresh.models / "vae")
        names = fresh.part("nodes.loaders").files_in("vae")
        assert VAE in names and "old.pt" not in names
        Path(fresh.models / "vae" / "old.pt").unlink()
