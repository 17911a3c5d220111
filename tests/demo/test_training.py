"""The parts of the training that must agree with ComfyUI, and those that must not lose anything."""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.demo.embedded import FOLDER, TEXT_ENCODER
from pack.tests.graphs import loader, node
from safetensors.torch import load_file

MODULES = ("autoencoder", "context", "denoiser", "networks", "sampling", "text_encoder")
MODULES += ("text_training", "weights", "world", "host")


@pytest.fixture(scope="module")
def training(host, comfyui) -> SimpleNamespace:
    """The modules of demo/training, around the ComfyUI of the host in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PATH", str(comfyui))
        modules = {m: importlib.import_module(f"pack.demo.training.{m}") for m in MODULES}
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def text(training):
    """What training reads, with the weights of the repository."""
    encoder = training.text_encoder.TextEncoder()
    state = {k: v.float() for k, v in load_file(FOLDER / TEXT_ENCODER).items()}
    encoder.load_state_dict(state, strict=False)
    return training.context.Text(encoder.requires_grad_(False), "cpu")


@pytest.fixture(scope="module")
def clip(host):
    """The same encoder, as our loader opens it in full precision."""
    name = TEXT_ENCODER.rpartition("/")[2]
    graph = {
        "clip": loader("TextEncoder", name, weight_dtype="fp32"),
        "out": node("PreviewAny", source=["clip", 0]),
    }
    return host.run(graph).outputs["clip"][0][0]


@pytest.mark.parametrize("prompt", ["a small blue bunny in a dress", "一只戴帽子的小熊", ""])
def test_training_reads_a_prompt_as_comfyui_does(training, text, clip, prompt) -> None:
    ids = torch.tensor([text.tokens([prompt])[0] + training.world.TAIL])
    theirs = clip.encode_from_tokens(clip.tokenize(prompt))
    assert torch.allclose(text(ids), theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 256), (512, 288)])
def test_training_reads_an_instruction_with_its_picture_as_comfyui_does(
    training, text, clip, size
) -> None:
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus

    image = torch.rand(1, size[1], size[0], 3, generator=torch.Generator().manual_seed(1))
    text.pictures.clear()
    text.remember(image, *size)
    ids = torch.tensor([text.tokens(["make it blue"])[0] + training.world.TAIL])
    theirs = TextEncodeQwenImageEditPlus.execute(clip, "make it blue", image1=image).args[0][0][0]
    assert torch.allclose(text(ids, size), theirs, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8, 20])
def test_the_schedule_is_comfyuis(training, steps) -> None:
    import comfy.model_sampling
    import comfy.samplers

    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=training.sampling.SHIFT, multiplier=1.0)
    theirs = comfy.samplers.simple_scheduler(sampling, steps)
    assert training.sampling.simple_schedule(steps) == pytest.approx(theirs.tolist(), abs=1e-6)


def test_flat_convolutions_and_folded_statistics_change_no_picture(training) -> None:
    networks = training.networks
    vae = networks.new_vae()
    torch.manual_seed(4)
    for parameter in vae.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    images = torch.rand(2, 3, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images)
        before = vae.decode(latents)
        module = next(m for m in vae.modules() if isinstance(m, training.host.wan.CausalConv3d))
        x = torch.rand(1, module.in_channels, 1, 8, 8)
        assert torch.allclose(networks.flat_convolution(module, x), module(x), atol=1e-5)
        networks.fold_statistics(vae, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
        folded = vae.encode(images)
        mean, std = networks.statistics()
        assert torch.allclose(folded.mean((0, 2, 3, 4)), mean, atol=1e-3)
        assert torch.allclose(folded.std((0, 2, 3, 4)), std, atol=1e-3)
        assert torch.allclose(vae.decode(folded), before, atol=1e-3)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(training, tmp_path) -> None:
    def step(weights, seed):
        torch.manual_seed(seed)
        for p in weights.working:
            p.grad = torch.randn_like(p)
        weights.update(1e-3)

    weights, resumed = (training.weights.Weights(64, "cpu") for _ in range(2))
    for seed in range(3):
        step(weights, seed)
    weights.save(tmp_path / "checkpoint.safetensors")
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 3
    for a, b in zip(weights.average, resumed.average, strict=True):
        assert torch.equal(a, b)
    step(weights, 9)
    step(resumed, 9)
    for a, b in zip(weights.master, resumed.master, strict=True):
        assert torch.allclose(a, b, atol=2e-5)  # the moments are kept in bfloat16


def test_an_export_opens_as_an_edit_model(training, tmp_path) -> None:
    weights = training.weights.Weights(64, "cpu")
    weights.export(tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "__index_timestep_zero__" in tensors
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@given(st.lists(st.integers(0, 150_000), max_size=12), st.integers(0, 9), st.integers(0, 999))
def test_strangers_come_before_the_end_and_push_nothing_out(training, ids, count, seed) -> None:
    torch.manual_seed(seed)
    tail = training.world.TAIL
    tokens = torch.tensor([ids + tail] * 3)
    fillers = torch.tensor([7, 8])
    found = training.text_training.with_strangers(tokens, count, fillers)
    assert found.shape == (3, len(ids) + len(tail) + count)
    for row in found.tolist():
        assert row[-len(tail) :] == tail
        rest = iter(row[: -len(tail)])
        assert all(token in rest for token in ids)  # in order, each one


@given(st.lists(st.lists(st.integers(0, 150_000), max_size=90), min_size=1, max_size=30))
def test_prompts_of_one_length_share_a_batch_and_keep_their_picture(training, prompts) -> None:
    world = training.world
    groups = world.by_length(random.Random(0), prompts, list(range(len(prompts))), 1)
    assert sorted(o for g in groups.values() for o in g.owner.tolist()) == [*range(len(prompts))]
    for length, group in groups.items():
        assert group.tokens.shape[1] == length <= world.LONGEST + len(world.TAIL)
        assert (group.tokens[:, -len(world.TAIL) :] == torch.tensor(world.TAIL)).all()
