"""The sampler within VRAM in the real ComfyUI: where nothing is short it is a KSampler."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.core.budget import POLICIES
from pack.tests.graphs import LORA, node, text_to_image
from pack.tests.host import RunError
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, transformer, within

NAMES = """
euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0
exp_heun_2_x0_sde dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral
dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde
dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm
lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral
res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2
seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2
"""
SAMPLERS = NAMES.split()


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_gives_what_a_ksampler_gives(host, name: str) -> None:
    stock = latent(host.run(small(name, steps=3)))
    run = host.run(within(small(name, steps=3)))
    assert latent(run).equal(stock)
    status = run.status("sampler")
    assert status["done"] == "as asked" and status["exactness"] == "exact"
    assert status["forward_passes_repeated"] == 0 and status["settings_asked"]["steps"] == 3
    assert run.outputs["sampler"][1][0] == status["text"]


def test_these_are_all_samplers_that_there_are(host) -> None:
    import comfy.samplers

    assert comfy.samplers.KSampler.SAMPLERS == SAMPLERS


def test_the_patch_gives_what_a_ksampler_gives(host) -> None:
    assert latent(host.run(fitted(small(seed=3)))).equal(latent(host.run(small(seed=3))))


def inpainting() -> dict[str, Any]:
    """A batch of three of which two are taken, a mask, and less than full denoise."""
    graph = small()
    graph["latent"]["inputs"]["batch_size"] = 3
    graph["some"] = node("LatentFromBatch", samples=["latent", 0], batch_index=1, length=2)
    graph["mask"] = node("SolidMask", value=0.5, width=32, height=32)
    graph["masked"] = node("SetLatentNoiseMask", samples=["some", 0], mask=["mask", 0])
    graph["sampler"]["inputs"].update(latent_image=["masked", 0], denoise=0.6, steps=3)
    return graph


def with_lora() -> dict[str, Any]:
    """The model with a LoRA."""
    graph = small()
    given = {"model": ["unet", 0], "lora_name": LORA, "strength_model": 1.0}
    graph["lora"] = node("LoraLoaderModelOnly", **given)
    graph["shift"]["inputs"]["model"] = ["lora", 0]
    return graph


@pytest.mark.parametrize("graph", [inpainting(), with_lora()], ids=["inpainting", "lora"])
def test_masks_batches_and_loras_are_as_in_a_ksampler(host, graph: dict[str, Any]) -> None:
    stock = host.run(graph).outputs["sampler"][0][0]
    made = host.run(within(graph)).outputs["sampler"][0][0]
    assert made.keys() == stock.keys()
    assert all(made[k].equal(v) if torch.is_tensor(v) else made[k] == v for k, v in stock.items())
    model = transformer(host, graph)
    with blocks_fail(model, Faults({1, 6})) as faults:
        run = host.run(within(graph))
    assert faults.raised == 2 and latent(run).equal(stock["samples"]), run.status("sampler")["text"]


def test_its_inputs_are_those_of_a_ksampler_and_three_more(host) -> None:
    classes = host.nodes.NODE_CLASS_MAPPINGS
    stock = classes["KSampler"].INPUT_TYPES()["required"]
    ours = classes["QwenVRAMSampler"].INPUT_TYPES()["required"]
    assert list(ours) == [*stock, "policy", "vram_limit", "settings"]
    for name, (kind, *more) in stock.items():
        mine = ours[name]
        if isinstance(kind, (list, tuple)):
            assert mine[1]["options"] == kind
            continue
        assert mine[0] == kind
        for bound in ("min", "max", "step", "round", "control_after_generate"):
            assert mine[1].get(bound) == more[0].get(bound), (name, bound)


FINITE_CHECK = "qwen_vram.finite_check"  # of the loader, whatever comes behind it


def test_a_later_fitting_replaces_an_earlier_one(host) -> None:
    from comfy.patcher_extension import WrappersMP

    stock = latent(host.run(small()))
    graph = fitted(small(), policy="allow approximations")
    twice = {
        **graph,
        "again": node("QwenVRAMFit", model=["fit", 0], policy="exact only", vram_limit=1),
    }
    twice["sampler"]["inputs"]["model"] = ["again", 0]
    model = transformer(host, twice)
    with blocks_fail(model, Faults({0})) as faults:
        assert latent(host.run(twice)).equal(stock)
    assert faults.raised == 1
    patched = host.executor.caches.outputs.get_local("again").outputs[0][0]
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        found = {k: len(w) for k, w in patched.wrappers[kind].items() if k != FINITE_CHECK}
        assert sum(found.values()) == 1
    with blocks_fail(model, Faults({1, 2})):
        run = host.run(within(fitted(small())))
    assert latent(run).equal(stock) and run.status("sampler")["forward_passes_repeated"] == 2


def test_two_samplers_share_a_model_and_the_plain_one_stays_plain(host) -> None:
    model = transformer(host, small())
    with blocks_fail(model, Faults({0, 1, 2})):
        made = latent(host.run(within(small(seed=7))))
    run = host.run(small(seed=7))
    assert run.executed == ["sampler", "out"]  # with the very same model
    assert torch.allclose(made, latent(run), atol=1e-2)
    assert all("forward" not in vars(module) for module in model.modules())
    host.forget_everything()
    assert latent(host.run(small(seed=7))).equal(latent(run))


def test_weights_in_pinned_ram_stay_there_after_the_run(fresh) -> None:
    graph = small()
    model = fresh.run(graph).outputs["shift"][0][0]
    weight = "diffusion_model.img_in.weight"
    model.pinned.add(weight)
    try:
        fresh.run(within(graph))
        gc.collect()
        assert weight in model.pinned
    finally:
        model.pinned.discard(weight)


def test_a_fitted_model_tells_its_own_node_and_the_sampler(host, monkeypatch) -> None:
    told: list[tuple[str, str]] = []
    tell = lambda text, node_id, sid: told.append((node_id, text))  # noqa: E731
    monkeypatch.setattr(host.server, "send_progress_text", tell)
    host.run(fitted(small(seed=31)))
    final = "as asked (exact) · not in the picture's metadata: the client sent no workflow"
    assert [line for line in told if line[0] in ("fit", "sampler")] == [
        ("fit", "fits itself to the memory when a sampler runs with it"),
        ("sampler", final),
        ("fit", final),
    ]


# --------------------------------------------------------------------------- changed settings
def failing_but_at(side: int) -> Faults:
    """Whenever a pass, or a tile, has not the tokens of a square picture of that side (px)."""

    class OtherSizes(Faults):
        def hook(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs["hidden_states"].shape[1] != (side // 16) ** 2:
                self.call()

    return OtherSizes(range(10_000))


def test_as_a_last_resort_settings_and_size_change(host) -> None:
    graph = text_to_image(size=192, steps=4)
    graph["sampler"]["inputs"]["cfg"] = 9.0
    table = "100000: 50, 9, heun\n0: 3, 5, ddim"
    with blocks_fail(transformer(host, graph), failing_but_at(144)):
        run = host.run(within(graph, policy=POLICIES[2], settings=table))
    status = run.status("sampler")
    assert latent(run).shape[-2:] == (18, 18)
    assert status["settings_used"] == {
        "steps": 3,
        "cfg": 5.0,
        "sampler_name": "ddim",
        "latent_size": "18x18",
    }
    assert status["settings_asked"]["latent_size"] == "24x24"
    assert status["exactness"] == "changed settings" and status["rung"] == "settings"
    assert status["done"] == "a smaller picture with other settings"
    assert status["text"].startswith(f"{status['done']} (changed settings) · steps 3 instead of 4")
    assert status["runs_that_did_not_fit"] == 1
    count = status["forward_passes_repeated"]
    assert count >= 4 and f"forward passes repeated: {count} in 2 runs" in status["text"]
    assert "steps 3 instead of 4" in status["text"] and "cfg 5.0 instead of 9.0" in status["text"]
    graph["latent"]["inputs"].update(width=144, height=144)
    graph["sampler"]["inputs"].update(steps=3, cfg=5.0, sampler_name="ddim")
    assert latent(host.run(graph)).equal(latent(run))


def test_settings_never_change_where_that_is_not_allowed(host) -> None:
    graph = text_to_image(size=128, steps=1)
    model = transformer(host, graph)
    with blocks_fail(model, failing_but_at(0)), pytest.raises(RunError, match="not enough"):
        host.run(within(graph))
    with blocks_fail(model, failing_but_at(0)) as faults, pytest.raises(RunError, match="Tried"):
        host.run(within(graph, policy=POLICIES[2]))
    assert faults.raised < 60


@pytest.mark.parametrize(
    ("table", "sentence"),
    [("0: 30, 7, dmpp", "no sampler 'dmpp'"), ("12 30, 7, euler", "line 1")],
)
def test_a_wrong_table_is_refused_with_a_sentence(host, table: str, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        host.run(within(small(), policy=POLICIES[2], settings=table))
    host.run(within(small(), settings=table))  # it is used with that policy alone


def test_references_and_sides_become_smaller_together(host) -> None:
    sampler = host.part("nodes.changed_settings")
    references = [torch.rand(1, 16, 1, 16, 24), torch.rand(1, 16, 10, 4)]
    positive = [[torch.zeros(1, 3, 8), {"reference_latents": references, "strength": 1.0}]]
    row = sampler.Row(0, 30, 3.0, "euler")
    request = sampler.Request(
        20, 4.0, "heun", positive, [], {"samples": torch.zeros(2, 16, 1, 64, 48)}
    )
    made = request.changed(row, 0.5)
    assert (made.steps, made.cfg, made.sampler_name) == (20, 3.0, "euler")
    assert made.latent["samples"].shape == (2, 16, 1, 32, 24)
    shapes = [tuple(x.shape[-2:]) for x in made.positive[0][1]["reference_latents"]]
    assert shapes == [(8, 12), (8, 4)] and references[0].shape[-1] == 24
    assert made.settings()["reference_sizes"] == "12x8, 4x8"
    least = request.changed(row, 0.01)
    assert least.sizes() != made.sizes() and least.changed(row, 0.5).sizes() == least.sizes()


@pytest.mark.parametrize("side", [20, 10])
def test_an_area_stays_where_it_was_in_a_smaller_picture(host, monkeypatch, side: int) -> None:
    """In the right half of a picture of 24 latent pixels, which becomes one of 18 or 10."""
    graph = text_to_image(size=192, steps=1)
    area = {"conditioning": ["positive", 0], "width": 96, "height": 64, "x": 96, "y": 128}
    graph["right"] = node("ConditioningSetArea", strength=1.0, **area)
    graph["all"] = node(
        "ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["right", 0]
    )
    graph["sampler"]["inputs"]["positive"] = ["all", 0]

    def forward(executor: Any, plan: Any, x: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if max(x.shape[-2:]) > side:
            raise torch.OutOfMemoryError("injected by a test")
        return usual(executor, plan, x, *rest, **more)

    reductions = host.part("nodes.reductions")
    usual = reductions.forward
    monkeypatch.setattr(reductions, "forward", forward)
    run = host.run(within(graph, policy=POLICIES[2]))
    assert run.status("sampler")["exactness"] == "changed settings"
    assert latent(run).isfinite().all() and latent(run).shape[-1] <= side


@given(
    old=st.tuples(st.integers(4, 64), st.integers(4, 64)),
    new=st.tuples(st.integers(4, 64), st.integers(4, 64)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_an_area_is_never_outside_of_the_picture(host, old, new, corners) -> None:
    smaller = tuple(min(pair) for pair in zip(old, new, strict=True))
    starts = [min(side - 1, int(side * part)) for side, part in zip(old, corners, strict=False)]
    lengths = [
        max(1, int((side - start) * part))
        for side, start, part in zip(old, starts, corners[2:], strict=True)
    ]
    area = host.part("nodes.changed_settings")._area
    *made, y, x = area((*lengths, *starts), old, smaller)
    for length, start, side in zip(made, (y, x), smaller, strict=True):
        assert length >= 1 and start >= 0 and start + length <= side
    assert area((*lengths, *starts), old, old) == (*lengths, *starts)
    film = (99, *lengths, 0, *starts)  # with frames
    assert area(film, old, smaller) == (99, *made, 0, y, x)


def test_an_area_in_per_cent_stays_as_it_is(host) -> None:
    module = host.part("nodes.changed_settings")
    share = ("percentage", 0.5, 0.5, 0.5, 0.0)
    positive = [
        [torch.zeros(1, 3, 8), {"area": share}],
        [torch.zeros(1, 3, 8), {"area": (4, 8, 2, 8)}],
    ]
    samples = {"samples": torch.zeros(1, 16, 12, 24)}
    request = module.Request(20, 4.0, "heun", positive, [], samples)
    made = request.changed(module.Row(0, 3, 3.0, "euler"), 0.75)
    assert made.latent["samples"].shape[-2:] == (8, 18)
    assert [values["area"] for _, values in made.positive] == [share, (3, 6, 1, 6)]
    assert positive[1][1]["area"] == (4, 8, 2, 8)


@pytest.mark.parametrize(("size", "scale", "runs"), [(64, 0.5, 1), (128, 0.0, 1), (512, 1.0, 5)])
def test_what_will_fail_again_is_not_run_again(
    host, monkeypatch, size: int, scale: float, runs: int
) -> None:
    """A picture that cannot become smaller, one of which no size would fit, and one that can."""
    sampler, tried = host.part("nodes.sampler"), []

    def run(model: Any, request: Any, more: Any) -> None:
        tried.append(request.latent["samples"].shape[-1])
        raise sampler.DoesNotFit("not enough", 0, scale)

    monkeypatch.setattr(sampler, "_run", run)
    with pytest.raises(RunError, match="not enough"):
        host.run(within(text_to_image(size=size), policy=POLICIES[2]))
    assert len(tried) == runs and tried == sorted(set(tried), reverse=True)


def test_nested_latents_are_not_made_smaller(host) -> None:
    from comfy.nested_tensor import NestedTensor

    module = host.part("nodes.changed_settings")
    nested = NestedTensor([torch.zeros(1, 16, 8, 8), torch.zeros(1, 8, 32)])
    request = module.Request(20, 4.0, "heun", [], [], {"samples": nested})
    assert request.changed(module.Row(0, 3, 3.0, "euler"), 0.5) is request
    assert request.settings()["latent_size"] is None
