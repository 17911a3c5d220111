"""fp16 that overflows ends in a sentence, not in a black picture; other types are left alone."""

from __future__ import annotations

import pytest
import torch
from pack.tests.graphs import CLIP, UNET, encode, loader, node, preview, text_to_image
from pack.tests.host import RunError
from pack.tests.nodes.test_loaders import load
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.fixture
def fp16(fresh, monkeypatch):
    """The host as on a card that computes in fp16 and in bf16."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "should_use_fp16", lambda *args, **more: True)
    monkeypatch.setattr(mm, "should_use_bf16", lambda *args, **more: True)
    monkeypatch.setattr(mm, "text_encoder_device", lambda: torch.device("cpu"))
    return fresh


@pytest.fixture(scope="module")
def loud(host):
    """Files whose numbers go beyond what fp16 holds: results of a transformer, weights of a CLIP."""
    for folder, name, key, factor in (
        ("diffusion_models", UNET, "proj_out.weight", 3e5),
        ("text_encoders", CLIP, "model.layers.0.mlp.down_proj.weight", 1e8),
    ):
        with safe_open(host.models / folder / name, "pt") as file:
            sd = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        sd[key] = sd[key] * factor
        save_file(sd, host.models / folder / f"loud_{name}", metadata)
    yield f"loud_{UNET}", f"loud_{CLIP}"
    for folder, name in (("diffusion_models", UNET), ("text_encoders", CLIP)):
        (host.models / folder / f"loud_{name}").unlink()


def picture(host, name: str, weight_dtype: str) -> torch.Tensor:
    """What two steps with this transformer give."""
    graph = text_to_image()
    graph["unet"] = loader("DiffusionModel", name, weight_dtype=weight_dtype)
    return host.run(graph).outputs["sampler"][0][0]["samples"]


def test_a_transformer_that_overflows_says_where_and_what_to_choose(fp16, loud) -> None:
    with pytest.raises(RunError, match="fp16 overflowed in this model at step 1.*Choose bf16"):
        picture(fp16, loud[0], "fp16")
    assert torch.isfinite(picture(fp16, loud[0], "bf16")).all()
    assert torch.isfinite(picture(fp16, UNET, "fp16")).all()


def test_what_came_in_broken_is_not_blamed_on_the_model(fp16) -> None:
    model, _ = load(fp16, "DiffusionModel", UNET, weight_dtype="fp16")
    check = fp16.part("nodes.finite_check")._apply_model
    x = torch.full((1, 16, 1, 8, 8), float("nan"))

    class Executor:
        class_obj = model.model

        def __call__(self, x, *arguments, **more):
            return x

    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    with pytest.raises(ValueError, match=r"at step 2 is no longer a number \(the latent\)"):
        check(Executor(), x, None, None, None, None, options)
    broken = torch.full((1, 2, 4), float("inf"))
    with pytest.raises(ValueError, match=r"\(the latent\)"):
        check(Executor(), x, None, c_crossattn=broken, transformer_options={})


def test_other_types_are_not_even_asked(fp16, monkeypatch) -> None:
    asked = []
    module = fp16.part("nodes.finite_check")
    monkeypatch.setattr(module, "_finite", lambda tensor: asked.append(tensor) or True)
    picture(fp16, UNET, "bf16")
    assert not asked
    picture(fp16, UNET, "fp16")
    assert asked


def test_a_type_that_another_node_sets_counts(fp16, loud) -> None:
    graph = text_to_image()
    graph["unet"] = loader("DiffusionModel", loud[0], weight_dtype="bf16")
    graph["type"] = node("ModelComputeDtype", model=["unet", 0], dtype="fp16")
    graph["shift"]["inputs"]["model"] = ["type", 0]
    with pytest.raises(RunError, match="fp16 overflowed in this model"):
        fp16.run(graph)


def test_a_text_encoder_whose_weights_overflow_says_so(fp16, loud) -> None:
    def encoded(weight_dtype: str) -> None:
        graph = {"clip": loader("TextEncoder", loud[1], weight_dtype=weight_dtype)}
        fp16.run({**graph, "e": encode("a red bunny", cache="off"), **preview("e")})

    with pytest.raises(RunError, match="fp16 overflowed in the text encoder"):
        encoded("fp16")
    encoded("bf16")
