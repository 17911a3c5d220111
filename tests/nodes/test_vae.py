"""Decode and encode within a number of bytes: the bits of ComfyUI's own untiled nodes, on the CPU."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pack.tests.graphs import VAE, loader, node, text_to_image
from pack.tests.host import RunError


@pytest.fixture(autouse=True)
def _as_in_the_worker() -> Iterator[None]:
    """ComfyUI runs its nodes without gradients."""
    with torch.inference_mode():
        yield


def narrow(colours: int = 3) -> Any:
    """A VAE of ComfyUI's with Qwen-Image's layers and few channels; RGBA with 4 colours."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE

    model = WanVAE(
        dim=8,
        z_dim=16,
        temperal_downsample=[False, True, True],
        image_channels=colours,
        conv_out_channels=colours,
    )
    noise = torch.Generator().manual_seed(7)
    weights = {}
    for name, value in model.state_dict().items():
        if value.ndim < 4:
            weights[name] = torch.rand(value.shape, generator=noise)
        else:
            weights[name] = torch.randn(value.shape, generator=noise) / value[0].numel() ** 0.5
    return comfy.sd.VAE(sd=weights)


@pytest.fixture(scope="module")
def vae(host) -> Any:
    """One for all who do not change it."""
    return narrow()


def picture(width: int, height: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    """An IMAGE of noise."""
    noise = torch.Generator().manual_seed(width * height + channels)
    return torch.rand(batch, height, width, channels, generator=noise)


def latents(width: int, height: int, batch: int = 1, frames: int = 1) -> torch.Tensor:
    """Latents of a picture of that size."""
    noise = torch.Generator().manual_seed(width * height)
    return torch.randn(batch, 16, frames, height // 8, width // 8, generator=noise)


def decode(host: Any, vae: Any, samples: torch.Tensor, limit: float = 0.0) -> tuple[Any, dict]:
    """By our node: pictures, and what it says it did."""
    result = host.part("nodes.vae").Decode.execute({"samples": samples}, vae, limit)
    return result.args[0], result.ui["qwen_vram"][0]


def encode(host: Any, vae: Any, pixels: torch.Tensor, limit: float = 0.0) -> tuple[Any, dict]:
    """By our node: latents, and what it says it did."""
    result = host.part("nodes.vae").Encode.execute(pixels, vae, limit)
    return result.args[0]["samples"], result.ui["qwen_vram"][0]


def stock_decode(host: Any, vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """By ComfyUI's node."""
    return host.nodes.VAEDecode().decode(vae, {"samples": samples})[0]


def stock_encode(host: Any, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """By ComfyUI's node."""
    return host.nodes.VAEEncode().encode(vae, pixels)[0]["samples"]


def least(host: Any, vae: Any, act: Any, source: torch.Tensor) -> float:
    """GB of the smallest plan for latents or a picture."""
    passes = host.part("nodes.vae_passes")
    if act is decode:
        layers, size = passes.Layers.decoding(vae.first_stage_model), source.shape[-2:]
    else:
        size = [length // 8 * 8 for length in source.shape[1:3]]
        layers = passes.Layers.encoding(vae.first_stage_model)
    return (passes.plan_for(layers.network(vae, len(source)), *size, 0).bytes + 1) / 1e9


# --------------------------------------------------------------------------- the bits of the whole
SIZES = [(256, 256), (333, 275), (416, 264), (2048, 72)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("act", [decode, encode])
def test_tiles_have_the_bits_of_stock_s_untiled_pass(host, vae, act, width, height) -> None:
    source = latents(width, height) if act is decode else picture(width, height)
    whole, said = act(host, vae, source)
    exact = (stock_decode if act is decode else stock_encode)(host, vae, source)
    assert said["how"] == "whole" and whole.equal(exact)
    smallest = least(host, vae, act, source)
    for limit in {smallest, max(smallest, said["predicted_bytes"] / 1.7e9)}:
        tiled, said = act(host, vae, source, limit)
        assert said["how"] == "tiles" and said["predicted_bytes"] <= limit * 1e9
        assert said["tiles"] > 3 and said["text"].endswith("predicted; exact")
        assert tiled.equal(exact) and tiled.dtype == exact.dtype and tiled.shape == exact.shape


def test_the_nodes_stand_where_stock_s_do(fresh) -> None:
    graph = text_to_image(size=256)
    graph["ours"] = node("QwenVRAMDecode", samples=["sampler", 0], vae=["vae", 0], vram_limit=0.02)
    graph["again"] = node("QwenVRAMEncode", pixels=["ours", 0], vae=["vae", 0], vram_limit=0.02)
    graph["stock"] = node("VAEEncode", pixels=["decode", 0], vae=["vae", 0])
    graph |= {f"of_{name}": node("PreviewAny", source=[name, 0]) for name in ("again", "stock")}
    run = fresh.run(graph)
    assert run.outputs["ours"][0][0].equal(run.outputs["decode"][0][0])
    again, stock = (run.outputs[name][0][0]["samples"] for name in ("again", "stock"))
    assert again.equal(stock)
    status = run.status("ours")
    width, height = status["tile_px"]
    line = f"{status['tiles']} tiles of {width}x{height} px, peak "
    assert status["text"].startswith(line) and status["text"].endswith("predicted; exact")
    assert width <= 256 and height <= 256 and width * height < 256 * 256
    shown = [data for event, data in fresh.events if event == "executed" and data["node"] == "ours"]
    assert shown[0]["output"]["qwen_vram"][0] == status


def test_a_batch_is_decoded_as_stock_does(host, vae) -> None:
    samples = latents(192, 256, batch=3)
    stock = stock_decode(host, vae, samples)
    whole, said = decode(host, vae, samples)
    assert said["how"] == "whole" and whole.equal(stock)
    tiled, said = decode(host, vae, samples, least(host, vae, decode, samples))
    assert said["how"] == "tiles" and said["slices"] == 1 and tiled.equal(stock)
    apart, said = decode(host, vae, samples, least(host, vae, decode, samples[:1]))
    assert said["tiles"] % 3 == 0 and said["slices"] == 1  # there is no room for three at once
    for picture_of, alone in zip(apart, samples.split(1), strict=True):
        assert picture_of.equal(stock_decode(host, vae, alone)[0])


def test_rgba_pictures_keep_their_transparency(host) -> None:
    vae, pixels, samples = narrow(4), picture(200, 268, 4), latents(192, 256)
    for samples_or_pixels, ours, stock in (
        (samples, decode, stock_decode),
        (pixels, encode, stock_encode),
        (pixels[..., :3], encode, stock_encode),  # stock fills up an opaque channel
    ):
        exact = stock(host, vae, samples_or_pixels)
        limit = least(host, vae, ours, samples_or_pixels)
        found, said = ours(host, vae, samples_or_pixels, limit)
        assert said["how"] == "tiles" and found.equal(exact)


def test_layers_of_a_picture_are_pictures_or_a_video(host, vae) -> None:
    layers = latents(64, 64, frames=3)
    found, said = decode(host, vae, layers)
    assert found.equal(stock_decode(host, vae, layers)) and "3 frames" in said["why"]
    apart = layers.movedim(2, 0).reshape(3, 16, 1, 8, 8)
    found, said = decode(host, vae, apart)
    assert said["how"] == "whole" and found.equal(stock_decode(host, vae, apart))


def test_nested_latents_are_decoded_by_their_first(host, vae) -> None:
    from comfy.nested_tensor import NestedTensor

    first = latents(64, 64)
    found, _ = decode(host, vae, NestedTensor([first, torch.zeros(1, 8, 4)]))
    assert found.equal(stock_decode(host, vae, first))


# ------------------------------------------------------------------------------ what stock does
def test_pictures_that_are_a_video_to_this_vae_go_stock_s_way(host, vae) -> None:
    pixels = picture(64, 64, batch=5)
    found, said = encode(host, vae, pixels)
    assert found.equal(stock_encode(host, vae, pixels)) and found.shape[2] == 2
    assert said["how"] == "stock" and "5 pictures are a video" in said["text"]


def test_another_vae_goes_stock_s_way_and_the_node_says_so(host, vae) -> None:
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(0)
    other = comfy.sd.VAE(sd={k: v.clone() for k, v in TAESD().state_dict().items()})
    samples, pixels = torch.randn(1, 4, 8, 8), picture(64, 64)
    found, said = decode(host, other, samples, 0.001)
    assert found.nan_to_num().equal(stock_decode(host, other, samples).nan_to_num())
    assert "TAESD is not the VAE of Qwen-Image" in said["text"]
    found, said = encode(host, other, pixels)
    assert found.nan_to_num().equal(stock_encode(host, other, pixels).nan_to_num())
    assert said["how"] == "stock"

    class Custom:
        """As another pack may have one."""

        decode, encode = staticmethod(vae.decode), staticmethod(vae.encode)

    samples = latents(64, 64)
    found, said = decode(host, Custom(), samples)
    assert found.equal(stock_decode(host, vae, samples)) and said["why"].startswith("Custom is not")


def test_a_vae_that_was_changed_goes_stock_s_way(host) -> None:
    class Traced(torch.nn.SiLU):
        """Whatever another pack puts in."""

    vae, samples, pixels = narrow(), latents(64, 64), picture(64, 64)
    vae.first_stage_model.decoder.head[1] = Traced()
    for found, said in (decode(host, vae, samples, 0.001), encode(host, vae, pixels, 0.001)):
        assert said["why"] == "it has other layers: Traced" and found.isfinite().all()


def test_what_stock_refuses_is_refused_in_stock_s_words(host, vae) -> None:
    for broken in (torch.zeros(1, 16, 8, 8), torch.zeros(16, 8, 8)):
        with pytest.raises(Exception) as stock:
            stock_decode(host, vae, broken)
        with pytest.raises(type(stock.value)):
            decode(host, vae, broken)


# -------------------------------------------------------------------------- when memory runs out
class Memory:
    """Fails where a test says, by the number of the call or by what it is asked to do."""

    def __init__(self, model: Any, fails: Callable[[int, torch.Tensor], bool]) -> None:
        self.fails, self.calls = fails, 0
        chosen = [model.decoder.conv1, *model.decoder.middle, *model.decoder.upsamples]
        chosen += [model.encoder.conv1, *model.encoder.middle, *model.encoder.downsamples]
        chosen += [model.decoder.head[2], model.encoder.head[2], model.decoder.middle[1].proj]
        self.handles = [layer.register_forward_hook(self.hook) for layer in chosen]

    def hook(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Behind a layer, when its output is there."""
        self.calls += 1
        if self.fails(self.calls, output):
            raise torch.OutOfMemoryError("injected")

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("act", [decode, encode])
def test_out_of_memory_anywhere_changes_no_bit(host, vae, act) -> None:
    model = vae.first_stage_model
    source = latents(160, 104) if act is decode else picture(160, 104)
    exact, said = act(host, vae, source)
    tight = max(said["predicted_bytes"] / 2e9, least(host, vae, act, source))
    for limit, every in ((0.0, 4), (tight, 1)):
        with Memory(model, lambda call, _: False) as memory:
            act(host, vae, source, limit)
        for failing in range(1, memory.calls + 1, every):
            with Memory(model, lambda call, _, failing=failing: call == failing):
                found, said = act(host, vae, source, limit)
            assert found.equal(exact) and said["failures"] == 1 and said["how"] == "tiles"
            assert "out of memory 1 times, went on smaller" in said["text"]


def test_memory_that_stays_short_ends_in_smaller_tiles(host, vae, monkeypatch) -> None:
    samples = latents(768, 256)
    exact, _ = decode(host, vae, samples)
    recovery, recovered = host.part("nodes.recovery"), []
    real = recovery.recover
    monkeypatch.setattr(recovery, "recover", lambda *a, **k: recovered.append(a) or real(*a, **k))
    with Memory(vae.first_stage_model, lambda _, made: made.numel() > 500_000):
        found, said = decode(host, vae, samples)
    assert found.equal(exact) and said["failures"] >= 2 and said["tiles"] > 6
    assert recovered == [([vae.patcher],)] * said["failures"]  # no half a cast is left behind


def test_if_nothing_fits_the_error_tells_what_was_tried(host, vae, monkeypatch) -> None:
    import comfy.model_management as management

    freed = []
    passes = host.part("nodes.vae_passes").Pass
    monkeypatch.setattr(passes, "free_bytes", lambda _: 9_000_000)
    monkeypatch.setattr(management, "free_memory", lambda *a, **k: freed.append(k) or [])
    with (
        Memory(vae.first_stage_model, lambda *_: True),
        pytest.raises(RuntimeError, match="512x256 px do not fit") as error,
    ):
        decode(host, vae, latents(512, 256))
    text = str(error.value)
    assert "smallest tiles" in text and "9.0 MB are free" in text
    assert re.search(r"A picture of (\d+)x\1 px should fit", text)
    assert [entry.model for entry in freed[-1]["keep_loaded"]] == [vae.patcher]
    assert error.value.__context__ is None and error.value.__cause__ is None


def test_other_errors_are_told_as_they_are(host, vae) -> None:
    def broken(*_: object) -> bool:
        raise IndexError("of another pack")

    with Memory(vae.first_stage_model, broken), pytest.raises(IndexError, match="another pack"):
        decode(host, vae, latents(64, 64))


def test_a_limit_that_nothing_fits_in_is_refused_with_the_remedy(host, vae) -> None:
    with pytest.raises(ValueError, match=r"vram_limit is 0\.1 MB, but 256x256 px take at least"):
        decode(host, vae, latents(256, 256), 0.0001)
    graph = {"vae": loader("VAE", VAE), "pixels": node("EmptyImage", width=64, height=64)}
    graph["pixels"]["inputs"] |= {"batch_size": 1, "color": 0}
    graph["out"] = node("PreviewAny", source=["encode", 0])
    for limit, words in ((0.0001, "vram_limit is"), (-1.0, "failed validation")):
        graph["encode"] = node(
            "QwenVRAMEncode", pixels=["pixels", 0], vae=["vae", 0], vram_limit=limit
        )
        with pytest.raises(RunError, match=words):
            host.run(graph)


# ----------------------------------------------------------------- progress, interrupt, and after
def test_progress_counts_tiles_from_the_start(host, vae) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: seen.append((value, total))
    )
    try:
        _, said = decode(host, vae, latents(256, 256), 0.0085)
        steps = said["tiles"] + said["slices"]
        assert {total for _, total in seen} == {steps} and seen[-1] == (steps, steps) and steps > 4
        with Memory(vae.first_stage_model, lambda _, made: made.numel() > 500_000):
            _, said = decode(host, vae, latents(768, 256), 0.05)
        steps = said["tiles"] + said["slices"]
        assert said["failures"] and seen[-1] == (steps, steps)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)


def test_interrupt_works_between_tiles_and_leaves_nothing_behind(host, vae) -> None:
    import comfy.model_management as management

    samples = latents(256, 256)
    exact, _ = decode(host, vae, samples)

    def interrupt(call: int, _: torch.Tensor) -> bool:
        if call == 15:
            management.interrupt_current_processing()
        return False

    with Memory(vae.first_stage_model, interrupt) as memory:
        with pytest.raises(management.InterruptProcessingException):
            decode(host, vae, samples, 0.009)
        assert memory.calls == 15
        found, _ = decode(host, vae, samples, 0.009)
    assert found.equal(exact)


def test_what_lies_between_is_given_back_as_soon_as_it_is_used(host, vae, monkeypatch) -> None:
    passes = host.part("nodes.vae_passes")
    works: list[Any] = []

    class Tiles(passes.Tiles):
        """Looks at those before it."""

        def step(self) -> None:
            assert all(work.source.tensor is None for work in works[1:])
            super().step()
            if not self.pending:
                works.append(self)

    monkeypatch.setattr(passes, "Tiles", Tiles)
    decode(host, vae, latents(256, 256), 0.009)
    assert len(works) > 2


def test_nothing_holds_the_vae_afterwards(host) -> None:
    vae = narrow()
    gone = weakref.ref(vae.first_stage_model)
    gc.collect()
    gc.disable()
    try:
        decode(host, vae, latents(256, 256), 0.009)
        with Memory(vae.first_stage_model, lambda call, _: call == 20):
            encode(host, vae, picture(96, 96))
        del vae
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_slices_is_said_and_right(host, vae, monkeypatch, fused: bool) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(management, "pytorch_attention_enabled_vae", lambda: fused)
    plan = host.part("nodes.vae_passes").plan_for

    def sliced(*arguments: Any) -> Any:
        """As for a picture that is larger than a test can be."""
        return dataclasses.replace(plan(*arguments), attention=256)

    samples = latents(320, 192)
    exact, said = decode(host, vae, samples)
    monkeypatch.setattr(host.part("nodes.vae_passes"), "plan_for", sliced)
    found, said = decode(host, vae, samples, said["predicted_bytes"] / 1.5e9)
    assert said["slices"] == 4 and "attention in 4 slices" in said["text"]
    assert "exact up to rounding" in said["text"]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
