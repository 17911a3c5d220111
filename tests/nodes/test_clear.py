"""Clear in the real ComfyUI: which models it unloads, when it acts, and what it leaves alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pack.core.clearing import KINDS, NEEDED, NOT_CHOSEN, UNKNOWN, Wish
from pack.tests.graphs import CLIP, VAE, encode, loader, node, preview, text_to_image
from pack.tests.host import RunError

CHOICES = {"diffusion_models": True, "text_encoders": True, "vaes": True, "other_models": True}


def clear(value: list[Any], level: str = "models", **inputs: Any) -> dict[str, Any]:
    """The node on a wire."""
    given = {**CHOICES, "keep_needed": False, **inputs}
    return node("QwenVRAMClear", value=value, level=level, **given)


@pytest.fixture
def models(fresh) -> Any:
    """ComfyUI's list of loaded models, emptied; the module that reads it."""
    import comfy.model_management as management

    management.unload_all_models()
    assert management.current_loaded_models == []
    return fresh.part("nodes.loaded_models")


@pytest.fixture
def loaded(fresh, models) -> Any:
    """The same with a transformer, a text encoder and a VAE loaded, as by the nodes that use them."""
    import comfy.model_management as management

    graph = {name: text_to_image()[name] for name in ("unet", "clip", "vae")}
    run = fresh.run({**graph, **preview(*graph)})
    unet, clip, vae = (run.outputs[name][0][0] for name in graph)
    management.load_models_gpu([unet, clip.patcher, vae.patcher])
    assert kinds(models) == ["VAE", "diffusion model", "text encoder"]
    return models


def kinds(models: Any) -> list[str]:
    """Of the models that are loaded."""
    return sorted(model.kind for _, model in models.known())


def free(host: Any, *names: str, level: str = "models", **wish: Any) -> dict[str, Any]:
    """What the route does when no prompt runs."""
    return host.part("nodes.freeing").free(Wish(level, **wish), frozenset(names))("at once")


# ----------------------------------------------------------------------------------- which models
def test_all_models_are_unloaded_and_named(host, loaded) -> None:
    answer = free(host)
    assert kinds(loaded) == [] and answer["kept"] == []
    unloaded = {m["name"]: (m["kind"], m["device"]) for m in answer["unloaded"]}
    assert unloaded[VAE] == ("VAE", "cpu") and unloaded[CLIP][0] == "text encoder"
    assert all(m["bytes"] > 100_000 and "files" not in m for m in answer["unloaded"])
    assert "3 models unloaded · at once" in answer["text"]
    host.run({**text_to_image(seed=2)})  # they are loaded again
    assert len(kinds(loaded)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_is_unloaded(host, loaded, kind: str) -> None:
    answer = free(host, kinds=frozenset({kind}))
    assert [m["kind"] for m in answer["unloaded"]] == ([kind] if kind != "other" else [])
    assert {m["kind"] for m in answer["kept"]} == set(kinds(loaded)) == set(KINDS[:3]) - {kind}
    assert {m["why"] for m in answer["kept"]} == {NOT_CHOSEN}


def test_the_cache_level_leaves_models_alone(host, loaded) -> None:
    answer = free(host, level="cache")
    assert len(kinds(loaded)) == 3 and answer["unloaded"] == answer["kept"] == []


def test_models_that_the_workflow_names_stay(host, loaded) -> None:
    answer = free(host, CLIP, "a bear", keep_needed=True)
    assert [(m["name"], m["why"]) for m in answer["kept"]] == [(CLIP, NEEDED)]
    assert kinds(loaded) == ["text encoder"]


def test_a_model_of_unknown_origin_stays_where_needed_ones_do(host, models) -> None:
    import comfy.model_management as management
    import torch
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    patcher = ModelPatcher(torch.nn.Linear(1000, 1000), cpu, cpu)
    management.load_models_gpu([patcher])
    answer = free(host, keep_needed=True)
    assert [(m["name"], m["kind"], m["why"]) for m in answer["kept"]] == [
        ("Linear", "other", UNKNOWN)
    ]
    assert free(host)["unloaded"][0]["name"] == "Linear" and kinds(models) == []


def test_stock_loaders_are_recognised_by_their_files(fresh, models) -> None:
    graph = {"vae": node("VAELoader", vae_name=VAE)}
    graph["image"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    graph["encode"] = node("VAEEncode", pixels=["image", 0], vae=["vae", 0])
    fresh.run({**graph, **preview("encode")})
    assert [(m["name"], m["why"]) for m in free(fresh, VAE, keep_needed=True)["kept"]] == [
        (VAE, NEEDED)
    ]
    assert [m["kind"] for m in free(fresh, "b.safetensors", keep_needed=True)["unloaded"]] == [
        "VAE"
    ]


# --------------------------------------------------------------------------------------- the node
def test_the_node_hands_on_the_very_same_object_and_frees_at_its_place(fresh, models) -> None:
    graph = text_to_image()
    graph["clear"] = clear(["sampler", 0], vaes=False)
    graph["decode"]["inputs"]["samples"] = ["clear", 0]
    run = fresh.run(graph)
    assert run.outputs["clear"][0][0] is run.outputs["sampler"][0][0]
    status = run.status("clear")
    assert {m["kind"] for m in status["unloaded"]} == {"diffusion model", "text encoder"}
    assert status["when"] == "at this node" and kinds(models) == ["VAE"]


def test_what_comes_behind_it_runs_again_only_when_its_input_did(fresh) -> None:
    graph = {**text_to_image(), "clear": clear(["sampler", 0])}
    graph["decode"]["inputs"]["samples"] = ["clear", 0]
    fresh.run(graph)
    assert fresh.run(graph).executed == []
    graph["save"]["inputs"]["filename_prefix"] = "another"
    assert fresh.run(graph).executed == ["save"]
    graph["sampler"]["inputs"]["seed"] = 2
    assert fresh.run(graph).executed == ["sampler", "clear", "decode", "save"]


def test_the_picture_is_the_same_with_it_on_every_wire_that_carries_models(fresh) -> None:
    plain = fresh.run(text_to_image()).outputs["decode"][0][0]
    graph = text_to_image()
    for wire, uses in (
        (["shift", 0], [("sampler", "model")]),
        (["clip", 0], [("positive", "clip"), ("negative", "clip")]),
        (["vae", 0], [("decode", "vae")]),
        (["sampler", 0], [("decode", "samples")]),
    ):
        graph[f"clear_{wire[0]}"] = clear(wire)
        for user, name in uses:
            graph[user]["inputs"][name] = [f"clear_{wire[0]}", 0]
    fresh.forget_everything()
    assert fresh.run(graph).outputs["decode"][0][0].equal(plain)


def test_prompts_behind_it_are_kept_whatever_it_frees(fresh) -> None:
    def graph(**inputs: Any) -> dict[str, Any]:
        parts = {"clip": loader("TextEncoder", CLIP), "clear": clear(["clip", 0], **inputs)}
        return {**parts, "a": encode("a fox", "clear"), **preview("a")}

    assert fresh.run(graph()).status("a")["kept"] == "stored"
    fresh.restart()
    assert fresh.run(graph(level="cache", vaes=False)).status("a")["result"] == "hit"


def test_needed_means_needed_by_the_running_graph(fresh, loaded) -> None:
    graph = {"vae": loader("VAE", VAE), "clear": clear(["vae", 0], keep_needed=True)}
    status = fresh.run({**graph, "out": node("PreviewAny", source=["clear", 0])}).status("clear")
    assert [m["name"] for m in status["kept"]] == [VAE] and kinds(loaded) == ["VAE"]


def test_everything_is_left_to_the_end_of_the_prompt(fresh, loaded) -> None:
    graph = {"vae": loader("VAE", VAE), "clear": clear(["vae", 0], level="everything")}
    run = fresh.run({**graph, "out": node("PreviewAny", source=["clear", 0])})
    assert "when this prompt ends" in run.status("clear")["text"]
    assert "VAE" in kinds(loaded)  # ComfyUI may forget the others: the graph has no use for them
    assert fresh.server.prompt_queue.get_flags() == {"free_memory": True}


# ----------------------------------------------------------------------------------- when it acts
@pytest.fixture
def gate(fresh) -> Iterator[Any]:
    """The node that waits."""
    gated = fresh.nodes.NODE_CLASS_MAPPINGS["TestGated"]
    gated.started.clear()
    gated.go.clear()
    yield gated
    gated.go.set()


def start(host: Any, fail: bool = False) -> tuple[threading.Thread, list[BaseException]]:
    """A worker that runs a graph up to the node that waits."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            graph = {"gated": node("TestGated", fail=fail)}
            host.run({**graph, "out": node("PreviewAny", source=["gated", 0])})
        except RunError as error:
            failures.append(error)

    worker = threading.Thread(target=work, name="worker")
    worker.start()
    assert host.nodes.NODE_CLASS_MAPPINGS["TestGated"].started.wait(30)
    return worker, failures


def whereabouts(moment: str) -> tuple[str, str]:
    """Work that tells when and where it is done."""
    return moment, threading.current_thread().name


@pytest.mark.parametrize(
    ("fail", "moment"), [(False, "between two nodes"), (True, "at the end of the prompt")]
)
def test_while_a_prompt_runs_the_worker_does_it_when_no_node_runs(
    fresh, gate, fail: bool, moment: str
) -> None:
    boundary = fresh.part("nodes.boundary").BOUNDARY
    worker, failures = start(fresh, fail)
    assert boundary.busy
    answer = boundary.submit(whereabouts)
    time.sleep(0.2)
    assert not answer.done()
    gate.go.set()
    assert answer.result(30) == (moment, "worker")
    worker.join()
    assert bool(failures) is fail and not boundary.busy
    assert boundary.submit(whereabouts).result(0) == ("at once", threading.current_thread().name)


def test_a_prompt_waits_for_work_that_began_before_it(fresh, gate) -> None:
    boundary = fresh.part("nodes.boundary").BOUNDARY
    release, working, started = threading.Event(), threading.Event(), []

    def slow(moment: str) -> bool:
        working.set()
        assert release.wait(30)
        return gate.started.is_set()

    thread = threading.Thread(target=lambda: started.append(boundary.submit(slow).result()))
    thread.start()
    assert working.wait(30)
    gate.go.set()
    prompt = threading.Thread(target=lambda: start(fresh)[0].join())
    prompt.start()
    time.sleep(0.3)
    release.set()
    thread.join()
    prompt.join()
    assert started == [False]


def test_work_that_fails_fails_no_prompt(fresh, gate) -> None:
    def broken(moment: str) -> None:
        raise IndexError("of a model that is gone")

    worker, failures = start(fresh)
    answer = fresh.part("nodes.boundary").BOUNDARY.submit(broken)
    gate.go.set()
    worker.join()
    assert failures == [] and isinstance(answer.exception(5), IndexError)


# ------------------------------------------------------------------------------------ the figures
def test_every_device_is_told_before_and_after(host, loaded) -> None:
    answer = free(host)
    (ram,) = answer["devices"]
    assert ram["kind"] == "cpu" and ram["before"]["own_bytes"] > ram["freed_bytes"]
    assert ram["freed_bytes"] == ram["before"]["own_bytes"] - ram["after"]["own_bytes"]
    assert ram["before"]["reserved_bytes"] is None  # torch does not count RAM
    left = {part["id"]: part for part in answer["left"]}
    assert left["weights"]["bytes"] is None and "node outputs" in left["weights"]["text"]


def test_what_keep_loaded_holds_is_said(fresh, models) -> None:
    graph = {"vae": loader("VAE", VAE, keep_loaded=True)}
    fresh.run({**graph, "out": node("PreviewAny", source=["vae", 0])})
    left = {part["id"]: part for part in free(fresh)["left"]}
    assert left["keep_loaded"]["bytes"] == (fresh.models / "vae" / VAE).stat().st_size
    assert "keep_loaded" in left["keep_loaded"]["text"]
