"""The warm-up form: one step, nothing saved, the rest as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.warmup import SINK, Form, Input, NodeFacts, NothingToWarm, check, warm_up_form
from pack.tests.examples import examples
from pack.tests.graphs import node, text_to_image

Graph = dict[str, Any]
INT = Input("INT", minimum=1)


def facts(outputs: str = "", output: bool = False, api: bool = False, **inputs: Any) -> NodeFacts:
    """What a class declares, shortly: names of types, and its inputs."""
    declared = {name: i if isinstance(i, Input) else Input(i) for name, i in inputs.items()}
    return NodeFacts(declared, tuple(outputs.split()), output, api)


ADVANCED = {"steps": INT, "start_at_step": Input("INT", minimum=0), "end_at_step": INT}
CLASSES = {
    "UNETLoader": facts("MODEL", unet_name="COMBO"),
    "CLIPLoader": facts("CLIP", clip_name="COMBO"),
    "VAELoader": facts("VAE", vae_name="COMBO"),
    "QwenVRAMLoadDiffusionModel": facts("MODEL"),
    "QwenVRAMLoadTextEncoder": facts("CLIP"),
    "QwenVRAMLoadVAE": facts("VAE"),
    "QwenVRAMCachedTextEncode": facts("CONDITIONING", clip=Input("CLIP", lazy=True), text="STRING"),
    "QwenVRAMPrefill": facts("INT", output=True, clip=Input("CLIP", lazy=True)),
    "QwenVRAMClear": facts("COMFY_MATCHTYPE_V3", output=True, value="COMFY_MATCHTYPE_V3"),
    "QwenVRAMPinned": facts("* * * *", content="STRING"),
    "CLIPTextEncode": facts("CONDITIONING", clip="CLIP", text="STRING"),
    "ModelSamplingAuraFlow": facts("MODEL", model="MODEL", shift="FLOAT"),
    "EmptySD3LatentImage": facts("LATENT", width="INT", height="INT", batch_size="INT"),
    "KSampler": facts("LATENT", model="MODEL", steps=INT, seed="INT", latent_image="LATENT"),
    "KSamplerAdvanced": facts("LATENT", model="MODEL", latent_image="LATENT", **ADVANCED),
    "SamplerCustomAdvanced": facts("LATENT LATENT", sigmas="SIGMAS", latent_image="LATENT"),
    "BasicScheduler": facts("SIGMAS", model="MODEL", steps=INT, denoise="FLOAT"),
    "HalfSigmas": facts("SIGMAS SIGMAS", sigmas="SIGMAS", step="INT"),
    "OtherSampler": facts("IMAGE", **{"mode.steps": Input("INT", minimum=4), "image": "IMAGE"}),
    "PrimitiveInt": facts("INT", value="INT"),
    "VAEDecode": facts("IMAGE", samples="LATENT", vae="VAE"),
    "ImageScale": facts("IMAGE", image="IMAGE"),
    "ImageBlend": facts("IMAGE", image1="IMAGE", image2="IMAGE"),
    "SaveImage": facts(output=True, images="IMAGE"),
    "PreviewImage": facts(output=True, images="IMAGE"),
    "ShowText": facts("STRING", output=True, text="STRING"),
    "ShowAnything": facts("STRING", output=True, source="*"),
    "ShowAndPass": facts("*", output=True, anything="*"),
    "SaveAndUpload": facts("STRING", output=True, image="IMAGE"),
    "ShowingSampler": facts("LATENT IMAGE", output=True, steps=INT, latent_image="LATENT"),
    "ShowingStage": facts("LATENT", output=True, sigmas="SIGMAS", latent_image="LATENT"),
    "SavingSampler": facts(
        "IMAGE", output=True, steps=INT, model="MODEL", latent_image="LATENT", save_prefix="STRING"
    ),
    "ShowingEncode": facts("CONDITIONING", output=True, clip="CLIP", text="STRING"),
    "LookAtLatent": facts("LATENT", output=True, samples="LATENT", vae="VAE"),
    "PaidUpscale": facts("IMAGE", api=True, image="IMAGE"),
    "PaidImage": facts("IMAGE", api=True, prompt="STRING"),
    "Join": facts("STRING", a="STRING", b="STRING"),
}


def form(graph: Graph) -> Form:
    """The warm-up form, by the table."""
    check(graph)
    before = copy.deepcopy(graph)
    made = warm_up_form(graph, {name: CLASSES[n["class_type"]] for name, n in graph.items()})
    assert graph == before
    return made


def sunk(prompt: Graph) -> list[Any]:
    """What the sinks read."""
    return sorted(n["inputs"]["value"] for n in prompt.values() if n["class_type"] == SINK)


def of(prompt: Graph, kind: str) -> list[Graph]:
    """The inputs of all nodes of a class."""
    return [n["inputs"] for n in prompt.values() if n["class_type"] == kind]


def test_the_bundled_graph_samples_one_step_and_ends_in_a_sink() -> None:
    graph = text_to_image(steps=20, seed=7, size=1328)
    graph["sampler"]["inputs"]["denoise"] = 0.5
    graph["latent"]["inputs"]["batch_size"] = 4
    made = form(graph)
    expected = {**graph, "sampler": copy.deepcopy(graph["sampler"])}
    expected["sampler"]["inputs"]["steps"] = 1
    del expected["save"]
    assert {k: n for k, n in made.prompt.items() if n["class_type"] != SINK} == expected
    assert sunk(made.prompt) == [["decode", 0]]
    assert made.kept == expected.keys() - {"sampler", "decode"}


def test_several_outputs_of_one_sampler_decode_once() -> None:
    graph = text_to_image()
    graph["look"] = node("PreviewImage", images=["decode", 0])
    graph["decode2"] = {**graph["decode"], "_meta": {"title": "again"}}
    graph["save2"] = node("SaveImage", images=["decode2", 0])
    made = form(graph).prompt
    assert len(of(made, "VAEDecode")) == 1 and len(sunk(made)) == 1


def test_steps_that_come_by_a_link_are_one_and_their_node_is_gone() -> None:
    graph = text_to_image()
    graph["number"] = node("PrimitiveInt", value=20)
    graph["sampler"]["inputs"]["steps"] = ["number", 0]
    made = form(graph).prompt
    assert made["sampler"]["inputs"]["steps"] == 1 and "number" not in made


def advanced(first: Any, last: Any, latent: str) -> Graph:
    """One stage of a chain."""
    inputs = {"steps": 20, "start_at_step": first, "end_at_step": last}
    return node("KSamplerAdvanced", model=["unet", 0], latent_image=[latent, 0], **inputs)


def test_two_stages_do_one_step_each() -> None:
    graph = text_to_image()
    graph["number"] = node("PrimitiveInt", value=10)
    graph["high"] = advanced(0, ["number", 0], "latent")
    graph["low"] = advanced(["number", 0], 10000, "high")
    graph["none"] = advanced(20, 10000, "low")
    graph["decode"]["inputs"]["samples"] = ["none", 0]
    made = form(graph).prompt
    for stage in ("high", "low"):
        inputs = made[stage]["inputs"]
        assert (inputs["steps"], inputs["start_at_step"], inputs["end_at_step"]) == (1, 0, 1)
    assert made["none"] == graph["none"], "it has no step in the real run, either"


def test_samplers_with_sigmas_get_the_first_two_of_the_schedule_as_it_is() -> None:
    graph = text_to_image()
    graph["plan"] = node("BasicScheduler", model=["unet", 0], steps=20, denoise=0.6)
    graph["half"] = node("HalfSigmas", sigmas=["plan", 0], step=10)
    for stage, slot in (("high", 0), ("low", 1)):
        inputs = {"sigmas": ["half", slot], "latent_image": ["latent", 0]}
        graph[stage] = node("SamplerCustomAdvanced", **inputs)
    graph["low"]["inputs"]["latent_image"] = ["high", 1]
    graph["twice"] = copy.deepcopy(graph["low"])
    graph["twice"]["inputs"]["latent_image"] = ["low", 0]
    graph["decode"]["inputs"]["samples"] = ["twice", 0]
    made = form(graph)
    assert made.prompt["plan"] == graph["plan"] and made.prompt["half"] == graph["half"]
    assert {"plan", "half", "unet"} <= made.kept and "high" not in made.kept
    cuts = of(made.prompt, "SplitSigmas")
    assert cuts == [{"sigmas": ["half", 0], "step": 1}, {"sigmas": ["half", 1], "step": 1}]
    for stage, slot in (("high", 0), ("low", 1), ("twice", 1)):
        cut, output = made.prompt[stage]["inputs"]["sigmas"]
        assert output == 0 and made.prompt[cut]["inputs"]["sigmas"] == ["half", slot]


def test_samplers_of_other_packs_by_the_name_of_the_input_not_below_its_minimum() -> None:
    graph = text_to_image()
    graph["other"] = node("OtherSampler", **{"mode.steps": 30, "image": ["decode", 0]})
    graph["save"]["inputs"]["images"] = ["other", 0]
    assert form(graph).prompt["other"]["inputs"]["mode.steps"] == 4


def test_a_schedule_that_one_step_would_make_not_a_number_gets_two() -> None:
    graph = text_to_image()
    graph["sampler"]["inputs"]["scheduler"] = "kl_optimal"
    assert form(graph).prompt["sampler"]["inputs"]["steps"] == 2


def test_an_output_node_in_the_middle_hands_on_what_it_was_given() -> None:
    graph = text_to_image()
    graph["text"] = node("Join", a="x", b="y")
    graph["show"] = node("ShowText", text=["text", 0])
    graph["any"] = node("ShowAnything", source=["show", 0])
    graph["pass"] = node("ShowAndPass", anything=["any", 0])
    graph["positive"]["inputs"]["text"] = ["pass", 0]
    made = form(graph)
    assert made.prompt["positive"]["inputs"]["text"] == ["text", 0]
    assert "positive" not in made.kept and "negative" in made.kept
    assert {"show", "pass", "any"}.isdisjoint(made.prompt)


def test_what_only_an_output_node_makes_is_missed_by_no_more_than_what_needs_it() -> None:
    graph = text_to_image()
    graph["upload"] = node("SaveAndUpload", image=["decode", 0])
    graph["join"] = node("Join", a=["upload", 0], b="x")
    graph["again"] = node("Join", a=["text", 0], b=["join", 0])
    graph["text"] = node("Join", a="x", b="y")
    graph["show"] = node("ShowText", text=["again", 0])
    made = form(graph).prompt
    assert sunk(made) == [["decode", 0], ["text", 0]]
    assert {"join", "again"}.isdisjoint(made)


def test_what_costs_money_does_not_run() -> None:
    graph = text_to_image()
    graph["paid"] = node("PaidUpscale", image=["decode", 0])
    graph["bought"] = node("PaidImage", prompt="a fox")
    graph["blend"] = node("ImageBlend", image1=["paid", 0], image2=["bought", 0])
    graph["save"]["inputs"]["images"] = ["blend", 0]
    made = form(graph).prompt
    assert {"paid", "bought", "blend"}.isdisjoint(made)
    assert sunk(made) == [["decode", 0]]


def test_samplers_and_encoders_that_show_a_picture_themselves_run_at_one_step() -> None:
    graph = text_to_image()
    graph["positive"]["class_type"] = "ShowingEncode"
    graph["plan"] = node("BasicScheduler", model=["unet", 0], steps=20, denoise=1.0)
    graph["first"] = node("ShowingSampler", steps=20, latent_image=["sampler", 0])
    graph["look"] = node("LookAtLatent", samples=["first", 0], vae=["vae", 0])
    graph["last"] = node("ShowingStage", sigmas=["plan", 0], latent_image=["look", 0])
    made = form(graph)
    assert made.prompt["first"]["inputs"]["steps"] == 1 and made.left_out == ()
    assert made.prompt["last"]["inputs"]["latent_image"] == ["first", 0], "what only looks is out"
    (cut,) = [name for name, n in made.prompt.items() if n["class_type"] == "SplitSigmas"]
    assert made.prompt["last"]["inputs"]["sigmas"] == [cut, 0]
    assert "positive" in made.kept
    ends = [["decode", 0], ["first", 0], ["last", 0], ["positive", 0], ["vae", 0]]
    assert sunk(made.prompt) == ends


def test_what_cannot_be_warmed_up_is_told() -> None:
    graph = text_to_image()
    inputs = {"steps": 20, "model": ["unet", 0], "latent_image": ["latent", 0], "save_prefix": "x"}
    graph["saving"] = node("SavingSampler", **inputs)
    graph["bought"] = node("PaidImage", prompt="a fox")
    graph["again"] = node("OtherSampler", **{"mode.steps": 9, "image": ["bought", 0]})
    graph["encode"] = node("KSampler", model=["unet", 0], steps=3, latent_image=["upload", 0])
    graph["upload"] = node("SaveAndUpload", image=["again", 0])
    graph["save2"] = node("SaveImage", images=["encode", 0])
    made = form(graph)
    assert made.left_out == ("encode", "saving")
    assert {"saving", "encode"}.isdisjoint(made.prompt)
    del graph["save2"]
    assert form(graph).left_out == ("saving",), "nobody asked for the rest"


def test_our_own_nodes() -> None:
    graph = text_to_image()
    graph["clear"] = node("QwenVRAMClear", value=["sampler", 0])
    graph["decode"]["inputs"]["samples"] = ["clear", 0]
    graph["list"] = node("QwenVRAMPrefill", clip=["clip2", 0])
    graph["clip2"] = node("CLIPLoader", clip_name="x")
    graph["positive"] = node("QwenVRAMPinned", content="0" * 64)
    made = form(graph).prompt
    assert made["decode"]["inputs"]["samples"] == ["sampler", 0]
    assert {"clear", "list", "clip2"}.isdisjoint(made), "a lazy encoder is not loaded for nothing"
    assert made["positive"] == graph["positive"]


def test_what_no_output_needs_does_not_run() -> None:
    graph = text_to_image()
    graph["alone"] = node("CLIPTextEncode", clip=["clip", 0], text="x")
    graph["scale"] = node("ImageScale", image=["decode", 0])
    graph["paid"] = node("PaidUpscale", image=["scale", 0])
    assert {"alone", "scale"}.isdisjoint(form(graph).prompt)


def test_a_graph_without_models_has_nothing_to_warm() -> None:
    with pytest.raises(NothingToWarm, match="nothing to warm up"):
        form({"n": node("PrimitiveInt", value=1), "s": node("ShowText", text=["n", 0])})
    with pytest.raises(NothingToWarm):
        form({"n": node("PrimitiveInt", value=1)})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "empty"),
        ({}, "empty"),
        ({"1": 3}, "Node 1 .* no class_type"),
        ({"1": {"class_type": "X", "inputs": []}}, "Node 1 "),
        ({"1": {"inputs": {}, "class_type": 3}}, "Node 1 "),
        (
            {"1": {"class_type": "X", "inputs": {"a": ["2", 0]}, "_meta": {"title": "T"}}},
            r'"T" \(1\): its input a comes from node 2',
        ),
    ],
)
def test_what_is_no_prompt_gets_a_sentence(prompt: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(prompt)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any nodes, linked in any way: cycles, wrong types, links to outputs that are not there."""
    kinds = draw(st.lists(st.sampled_from(sorted(CLASSES)), min_size=1, max_size=8))
    graph = {}
    for number, kind in enumerate(kinds):
        inputs: dict[str, Any] = {}
        for name in CLASSES[kind].inputs:
            source = draw(st.integers(-1, len(kinds) - 1))
            inputs[name] = 7 if source < 0 else [str(source), draw(st.integers(-1, 2))]
        graph[str(number)] = node(kind, **inputs)
    return graph


@settings(max_examples=examples(60), deadline=None)  # a busy machine is no failure
@given(graphs())
def test_any_graph_gives_a_form_that_holds_together_or_a_sentence(graph: Graph) -> None:
    try:
        made = form(graph)
    except NothingToWarm:
        return
    check(made.prompt)  # every link leads to a node
    own = {"SplitSigmas", SINK}
    for name, item in made.prompt.items():
        if item["class_type"] not in own:
            known = CLASSES[item["class_type"]]
            assert not known.api_node
            assert not known.output_node or item["class_type"].startswith("Showing")
            assert item["class_type"] == graph[name]["class_type"]
            assert item["inputs"].keys() == graph[name]["inputs"].keys()
        if item["class_type"] in ("KSampler", "OtherSampler", "ShowingSampler"):
            assert [v for k, v in item["inputs"].items() if k.endswith("steps")] in ([1], [4])
    assert sunk(made.prompt)
    for name in made.kept:
        assert made.prompt[name] == graph[name]
        links = [v[0] for v in made.prompt[name]["inputs"].values() if isinstance(v, list)]
        assert set(links) <= made.kept
