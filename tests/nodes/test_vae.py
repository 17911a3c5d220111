"""Decode and encode within a number of bytes: the picture of ComfyUI's own untiled nodes.

With one thread of the CPU its very bits; with more, other kernels round differently.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import VAE, loader, node, text_to_image
from pack.tests.host import RunError
from torch.overrides import TorchFunctionMode


@pytest.fixture(autouse=True)
def _as_in_the_worker() -> Iterator[None]:
    """ComfyUI runs its nodes without gradients. One thread, for the bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


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
        layers, size = passes.Layers.decoding(vae), source.shape[-2:]
    else:
        size = [length // 8 * 8 for length in source.shape[1:3]]
        layers = passes.Layers.encoding(vae)
    return (passes.plan_for(layers.network(vae, len(source)), *size, 0).bytes + 1) / 1e9


# --------------------------------------------------------------------------- the bits of the whole
SIZES = [(256, 168), (333, 275), (1024, 72)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("act", [decode, encode])
def test_tiles_have_the_bits_of_stock_s_untiled_pass(host, vae, act, width, height) -> None:
    source = latents(width, height) if act is decode else picture(width, height)
    whole, said = act(host, vae, source)
    exact = (stock_decode if act is decode else stock_encode)(host, vae, source)
    assert said["how"] == "whole" and whole.equal(exact)
    assert said["text"].endswith("predicted; exact")
    smallest = least(host, vae, act, source)
    for limit in {smallest, max(smallest, said["predicted_bytes"] / 1.7e9)}:
        tiled, said = act(host, vae, source, limit)
        assert said["how"] == "tiles" and said["predicted_bytes"] <= limit * 1e9
        assert said["tiles"] > 3 and said["text"].endswith("predicted; exact up to rounding")
        assert tiled.equal(exact) and tiled.dtype == exact.dtype and tiled.shape == exact.shape


def test_with_more_threads_tiles_are_exact_up_to_rounding(host, vae) -> None:
    samples = latents(256, 192)
    torch.set_num_threads(2)  # the fixture restores it
    exact = stock_decode(host, vae, samples)
    tiled, said = decode(host, vae, samples, least(host, vae, decode, samples))
    assert said["text"].endswith("; exact up to rounding")
    torch.testing.assert_close(tiled, exact, rtol=0, atol=1e-5)


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
    assert status["text"].startswith(line)
    assert status["text"].endswith("predicted; exact up to rounding")
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
    assert said["apart"]
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


def _seamless(vae: Any) -> str:
    part = vae.first_stage_model.decoder.upsamples[0].residual[2]
    part._conv_forward = part._conv_forward
    return "_conv_forward of its decoder.upsamples.0.residual.2"


def _model_decode(vae: Any) -> str:
    vae.first_stage_model.decode = vae.first_stage_model.decode
    return "replaced decode of its model"


def _vae_decode(vae: Any) -> str:
    vae.decode = vae.decode
    return "replaced its decode"


def _hook(vae: Any) -> str:
    vae.first_stage_model.decoder.register_forward_hook(lambda *_: None)
    return "a hook on its decoder"


def _inner(vae: Any) -> str:
    vae.first_stage_model.decoder.upsamples[-1].residual[1] = torch.nn.Mish()
    return "other layers: Mish"


def _padding(vae: Any) -> str:
    vae.first_stage_model.decoder.conv1.padding_mode = "circular"
    return "the padding of its decoder.conv1 is circular"


def _attention(vae: Any) -> str:
    vae.first_stage_model.decoder.middle[1].optimized_attention = lambda q, k, v: v
    return "replaced the attention of its decoder.middle.1"


def _patched(vae: Any) -> str:
    vae.patcher.add_object_patch("decoder.head.1", torch.nn.SiLU())
    return "replaced its decoder.head.1"


CHANGES = [_seamless, _model_decode, _vae_decode, _hook, _inner, _padding, _attention, _patched]


def test_a_change_anywhere_in_a_vae_sends_it_stock_s_way(host) -> None:
    unknown = host.part("nodes.vae_layers").why_unknown
    for change in CHANGES:
        vae = narrow()
        assert unknown(vae) == ""
        words = change(vae)
        assert words in unknown(vae), change


def test_what_stock_refuses_is_refused_in_stock_s_words(host, vae) -> None:
    for broken in (torch.zeros(1, 16, 8, 8), torch.zeros(16, 8, 8)):
        with pytest.raises(Exception) as stock:
            stock_decode(host, vae, broken)
        with pytest.raises(type(stock.value), match=re.escape(str(stock.value))):
            decode(host, vae, broken)


def test_an_empty_batch_is_refused_with_the_remedy(host, vae) -> None:
    for act, empty in ((decode, latents(64, 64)[:0]), (encode, picture(64, 64)[:0])):
        with pytest.raises(ValueError, match="its batch is empty. Connect at least one"):
            act(host, vae, empty)


# -------------------------------------------------------------------------- when memory runs out
ATTENTION = "scaled_dot_product_attention"


class Memory(TorchFunctionMode):
    """Fails where a test says, by the number of the call or by what it makes.

    `calls` counts those of torch's functions of the `names`.
    """

    def __init__(
        self,
        fails: Callable[[int, torch.Tensor], bool],
        names: tuple[str, ...] = ("conv2d", "conv3d", ATTENTION),
    ) -> None:
        super().__init__()
        self.fails, self.names, self.calls = fails, names, 0

    def __torch_function__(self, function, types, arguments=(), options=None) -> Any:  # noqa: ANN001
        """Fails when the result is there."""
        made = function(*arguments, **(options or {}))
        if getattr(function, "__name__", "") in self.names:
            self.calls += 1
            if self.fails(self.calls, made):
                raise torch.OutOfMemoryError("injected")
        return made


@pytest.mark.parametrize("act", [decode, encode])
def test_out_of_memory_anywhere_changes_no_bit(host, vae, act) -> None:
    source = latents(160, 104) if act is decode else picture(160, 104)
    exact, said = act(host, vae, source)
    tight = max(said["predicted_bytes"] / 2e9, least(host, vae, act, source))
    for limit, every in ((0.0, 17), (tight, 8)):
        with Memory(lambda call, _: False) as memory:
            act(host, vae, source, limit)
        for failing in range(1, memory.calls + 1, every):
            with Memory(lambda call, _, failing=failing: call == failing):
                found, said = act(host, vae, source, limit)
            assert found.equal(exact) and said["failures"] == 1 and said["how"] == "tiles"
            assert "out of memory once, went on smaller" in said["text"]


@pytest.mark.parametrize("tight", [False, True])
def test_out_of_memory_in_the_attention_itself_arrives(host, vae, tight: bool) -> None:
    samples = latents(256, 192)  # the host's attention would go on with another kernel
    exact = stock_decode(host, vae, samples)
    limit = 2 * least(host, vae, decode, samples) if tight else 0.0
    with Memory(lambda call, _: call == 1, (ATTENTION,)) as memory:
        found, said = decode(host, vae, samples, limit)
    assert memory.calls == 2 and said["failures"] == 1 and said["tiles"] > 3
    assert found.equal(exact) and said["text"].endswith("out of memory once, went on smaller")


def test_what_has_failed_is_remembered_from_picture_to_picture(host, vae) -> None:
    samples = latents(384, 256, batch=2)
    limit = least(host, vae, decode, samples[:1])
    assert limit < least(host, vae, decode, samples)
    exact, _ = decode(host, vae, samples, limit)
    with Memory(lambda _, made: made.shape[-2] > 800, (ATTENTION,)):
        found, said = decode(host, vae, samples, limit)
    assert said["failures"] == 1 and said["slices"] == 2
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


@pytest.fixture
def waits(host, monkeypatch) -> list[float]:
    """Seconds that would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(host.part("nodes.recovery"), "wait", seconds.append)
    return seconds


def test_memory_that_is_short_for_a_moment_is_waited_for(host, vae, waits) -> None:
    samples = latents(256, 192)
    exact, _ = decode(host, vae, samples)
    with Memory(lambda call, _: call < 8, ("empty_strided",)):
        found, said = decode(host, vae, samples, least(host, vae, decode, samples))
    assert found.equal(exact) and said["failures"] == 7 and 1 <= len(waits) < 7
    waits.clear()
    with (
        Memory(lambda *_: True),
        pytest.raises(RuntimeError, match="should be enough, but failed for 20 s"),
    ):
        decode(host, vae, samples)
    assert sum(waits) == 20


def test_what_another_program_may_give_back_is_waited_for(host, vae, waits, monkeypatch) -> None:
    """On a card whose memory somebody else holds at the moment."""
    samples = latents(256, 192)
    passes = host.part("nodes.vae_passes").Pass
    monkeypatch.setattr(passes, "_at_most", lambda _: 1 << 40)
    monkeypatch.setattr(passes, "free_bytes", lambda _: 1000 if len(waits) < 3 else 1 << 40)
    with Memory(lambda *_: len(waits) < 3):
        _, said = decode(host, vae, samples)
    assert len(waits) == 3 and said["failures"] >= 3


def test_tiles_grow_again_when_memory_is_back(host, vae, monkeypatch) -> None:
    passes = host.part("nodes.vae_passes")
    work = passes.Pass(vae, passes.Layers.decoding(vae), (64, 64), None)
    work.progress, work.tile_limit = passes.comfy.utils.ProgressBar(1), 1
    counts = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(passes.Pass, "free_bytes", lambda _, free=free: free)
        ends = (passes.Buffer.of(latents(512, 512)), work._between(work.network.after, 0, (64, 64)))
        tiles = passes.Tiles(work.layers.before, (1, 1), ends, lambda part: part, 4)
        work._cut_as_before(tiles)
        counts.append(len(tiles.pending))
    assert counts[0] == 1 and counts[1] > 8 and work.progress.total == counts[1]


def test_a_buffer_that_cannot_be_made_goes_to_the_ram(host, vae) -> None:
    passes = host.part("nodes.vae_passes")
    work = passes.Pass(vae, passes.Layers.decoding(vae), (8, 8), None)
    buffers = passes.Buffer.of(latents(64, 64)), passes.Buffer((1, 16, 1, 8, 8), "meta", None)
    buffers[1].device = torch.device("meta")
    layers = [vae.first_stage_model.conv2]
    tiles = passes.Tiles(layers, (1, 2), buffers, lambda part: part, 4)
    with Memory(lambda *_: True, ("empty_strided",)), pytest.raises(torch.OutOfMemoryError):
        tiles.step()
    work._give_way(tiles)
    assert buffers[1].device.type == "cpu" and work.in_ram and len(tiles.pending) == 2


def test_the_result_and_the_loading_find_room_too(host, vae, waits, monkeypatch) -> None:
    samples = latents(64, 64)
    exact, _ = decode(host, vae, samples)
    with Memory(lambda call, _: call == 1, ("empty",)):
        found, said = decode(host, vae, samples)
    assert found.equal(exact) and said["failures"] == 1
    assert said["text"].endswith("exact; out of memory once, went on again")
    with (
        Memory(lambda _, made: made.shape == (1, 3, 1, 64, 64), ("empty",)),
        pytest.raises(RuntimeError, match="while the memory of the result was taken"),
    ):
        decode(host, vae, samples)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(host.part("nodes.vae_passes").Pass, "_load", fails)
    with pytest.raises(RuntimeError, match="while the VAE was loaded, with no other model"):
        decode(host, vae, samples)


def test_nothing_is_planned_where_the_whole_fits(host, vae, monkeypatch) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("planned")

    for name in ("comfortable_bytes", "plan_for"):
        monkeypatch.setattr(host.part("nodes.vae_passes"), name, unwanted)
    assert decode(host, vae, latents(64, 64))[1]["how"] == "whole"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_batch_goes_as_stock_counts_it_on_every_device(host, vae, kind: str) -> None:
    passes = host.part("nodes.vae_passes")
    card = SimpleNamespace(
        device=torch.device(kind),
        vae_dtype=torch.float32,
        patcher=SimpleNamespace(get_free_memory=lambda _: 3.5e9),
    )
    layers = passes.Layers.decoding(vae)
    work = passes.Pass(card, layers, (64, 64), None)
    assert work._choose_count(4, 1_000_000_000) == 3 and not work.apart
    assert work.network.element_size == 12
    least = passes.plan_for(layers.network(card), 64, 64, 0).bytes
    work = passes.Pass(card, layers, (64, 64), least)
    assert work._choose_count(4, 1_000_000_000) == 1 and work.apart


def test_memory_that_stays_short_ends_in_smaller_tiles(host, vae, monkeypatch) -> None:
    samples = latents(768, 256)
    exact, _ = decode(host, vae, samples)
    recovery, recovered = host.part("nodes.recovery"), []
    real = recovery.recover
    monkeypatch.setattr(recovery, "recover", lambda *a, **k: recovered.append(a) or real(*a, **k))
    with Memory(lambda _, made: made.numel() > 500_000):
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
        Memory(lambda *_: True),
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

    with Memory(broken), pytest.raises(IndexError, match="another pack"):
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
        with Memory(lambda _, made: made.numel() > 500_000):
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

    with Memory(interrupt) as memory:
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
        with Memory(lambda call, _: call == 20):
            encode(host, vae, picture(96, 96))
        del vae
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_slices_is_said_and_right(host, vae, monkeypatch, fused: bool) -> None:
    import comfy.model_management as management

    if not fused:  # as without ComfyUI's option --use-pytorch-cross-attention
        monkeypatch.setattr(management, "pytorch_attention_enabled_vae", lambda: False)
        vae = narrow()
    plan = host.part("nodes.vae_passes").plan_for

    def sliced(*arguments: Any) -> Any:
        """As for a picture that is larger than a test can be."""
        return dataclasses.replace(plan(*arguments), attention=256)

    samples = latents(320, 192)
    exact, said = decode(host, vae, samples)
    assert exact.equal(stock_decode(host, vae, samples)) and said["text"].endswith("; exact")
    monkeypatch.setattr(host.part("nodes.vae_passes"), "plan_for", sliced)
    found, said = decode(host, vae, samples, said["predicted_bytes"] / 1.5e9)
    assert said["slices"] == 4 and "attention in 4 slices" in said["text"]
    assert "exact up to rounding" in said["text"]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
