"""Clear in the real ComfyUI: which models it unloads, when it acts, and what it leaves alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pack.core.clearing import KINDS, NEEDED, NOT_CHOSEN, UNKNOWN, Wish
from pack.tests.graphs import CLIP, UNET, VAE, encode, loader, node, preview, text_to_image
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
    assert ("0 models" if kind == "other" else "1 model") + " unloaded" in answer["text"]
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


def test_all_who_tell_of_models_call_them_the_same(fresh, loaded) -> None:
    told = {(m.name, m.kind) for _, m in loaded.known()}
    report = fresh.part("nodes.memory_sources").gather()["models"]
    assert told == {(UNET, "diffusion model"), (CLIP, "text encoder"), (VAE, "VAE")}
    assert told == {(m.name, m.kind) for m in fresh.part("nodes.warmup_run").resident_models()}
    assert told <= {(m["name"], m["kind"]) for m in report}
    assert {m["file"] for m in report} >= {UNET, CLIP, VAE}


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


def test_prompts_are_found_again_when_it_is_put_on_a_wire_or_taken_away(fresh) -> None:
    graph = {"clip": loader("TextEncoder", CLIP), "a": encode("a fox"), **preview("a")}
    more = {**graph, "clear": clear(["clip", 0]), "twice": clear(["clear", 0])}
    more["a"] = encode("a fox", "twice")
    assert fresh.run(graph).status("a")["kept"] == "stored"
    fresh.restart()
    assert fresh.run(more).status("a")["result"] == "hit"
    fresh.forget_everything()
    assert fresh.run(more).status("a")["kept"] == "stored"
    fresh.restart()
    assert fresh.run(graph).status("a")["result"] == "hit"


def test_a_list_is_handed_on_whole_and_memory_freed_once(fresh, loaded) -> None:
    graph = {"list": node("TestTextList"), "clear": clear(["list", 0])}
    graph["out"] = node("PreviewAny", source=["clear", 0])
    for _ in range(2):  # a run of its own counts anew
        fresh.restart()
        run = fresh.run(graph)
        assert run.outputs["clear"] == [["one", "two"]]
        (status,) = run.ui["clear"]["qwen_vram"]
        assert status["done"]


def test_blocked_items_of_a_list_do_not_keep_it_from_freeing(fresh) -> None:
    from comfy_execution.utils import ExecutionContext

    is_next = fresh.part("nodes.clear")._is_next_item
    prompt, another = (ExecutionContext(name, "7", None) for name in ("one", "another"))
    items = [prompt._replace(list_index=index) for index in range(3)]
    assert [is_next(item) for item in items] == [False, True, True]
    assert [is_next(another._replace(list_index=i)) for i in (1, 2)] == [False, True]  # 0 blocked
    assert not is_next(another._replace(list_index=0))  # it runs again


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
def gates(fresh) -> Iterator[tuple[Any, Any]]:
    """The nodes that wait, the second one asynchronous."""
    found = [fresh.nodes.NODE_CLASS_MAPPINGS[name] for name in ("TestGated", "TestGatedAsync")]
    for gated in found:
        gated.started.clear()
        gated.go.clear()
    fresh.server.prompt_queue.get_flags()
    yield found
    for gated in found:
        gated.go.set()


@pytest.fixture
def gate(gates) -> Any:
    """The node that waits."""
    return gates[0]


def start(host: Any, fail: bool = False, **more: Any) -> tuple[threading.Thread, list[Exception]]:
    """A worker that runs a graph up to the node that waits."""
    failures: list[Exception] = []

    def work() -> None:
        try:
            graph = {"gated": node("TestGated", fail=fail)}
            host.run({**graph, "out": node("PreviewAny", source=["gated", 0]), **more})
        except RunError as error:
            failures.append(error)

    worker = threading.Thread(target=work, name="worker")
    worker.start()
    assert host.nodes.NODE_CLASS_MAPPINGS["TestGated"].started.wait(30)
    return worker, failures


def between_prompts(host: Any) -> None:
    """What ComfyUI's worker does then (main.py, prompt_worker)."""
    import comfy.model_management as management

    flags = host.server.prompt_queue.get_flags()
    free_memory = flags.get("free_memory", False)
    if flags.get("unload_models", free_memory):
        management.unload_all_models()
    if free_memory:
        host.executor.reset()


def in_worker(act: Any, *arguments: Any) -> None:
    """Do it in another thread, to its end."""
    thread = threading.Thread(target=act, args=arguments, name="worker")
    thread.start()
    thread.join()


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


def test_it_waits_for_an_asynchronous_node_while_others_start_and_end(fresh, gates) -> None:
    gated, slow = gates
    boundary = fresh.part("nodes.boundary").BOUNDARY
    more = {"slow": node("TestGatedAsync", fail=False), "clear": clear(["gated", 0])}
    more |= {f"of_{name}": node("PreviewAny", source=[name, 0]) for name in ("slow", "clear")}
    runs: list[Any] = []
    graph = {"gated": node("TestGated", fail=False), **more}
    worker = threading.Thread(target=lambda: runs.append(fresh.run(graph)), name="worker")
    worker.start()
    assert slow.started.wait(30) and gated.started.wait(30)
    answer = boundary.submit(whereabouts)
    gated.go.set()
    time.sleep(0.3)
    assert not answer.done()
    slow.go.set()
    assert answer.result(30) == ("between two nodes", "worker")
    worker.join()
    assert "another node still runs" in runs[0].status("clear")["text"]


def test_between_prompts_the_worker_does_it_too(fresh, gate) -> None:
    boundary = fresh.part("nodes.boundary").BOUNDARY
    answer = boundary.submit(whereabouts)
    flags = fresh.server.prompt_queue.get_flags(reset=False)
    assert not flags["free_memory"] and not answer.done()  # nor when somebody looks
    in_worker(between_prompts, fresh)
    assert answer.result(0) == ("at once", "worker")


def test_work_and_a_wish_of_comfyui_s_own_do_not_displace_each_other(fresh, loaded, gate) -> None:
    boundary, queue = fresh.part("nodes.boundary").BOUNDARY, fresh.server.prompt_queue
    for first in (True, False):
        caches = fresh.executor.caches
        if first:
            queue.set_flag("free_memory", True)
        answer = boundary.submit(lambda moment: kinds(loaded))
        if not first:
            queue.set_flag("free_memory", True)
            boundary._ask()
        in_worker(between_prompts, fresh)
        assert answer.result(0) == (["VAE", "diffusion model", "text encoder"] if first else [])
        assert fresh.executor.caches is not caches and kinds(loaded) == []


def test_everything_is_measured_right_before_and_behind_it(fresh, loaded, gate) -> None:
    """Although the next prompt of a busy queue starts at once."""
    boundary, seen = fresh.part("nodes.boundary").BOUNDARY, []

    def before(moment: str) -> Any:
        seen.append((moment, "VAE" in kinds(loaded)))
        gate.started.clear()
        return lambda: (gate.started.is_set(), kinds(loaded))

    answers: list[Any] = []
    worker, _ = start(fresh, vae=loader("VAE", VAE), **preview("vae"))  # which stays for it
    wish = boundary.everything_forgotten(before)
    asking = threading.Thread(target=lambda: answers.append(asyncio.run(wish)))
    asking.start()
    time.sleep(0.2)
    assert seen == []
    gate.go.set()
    worker.join()

    def worker_goes_on() -> None:
        between_prompts(fresh)
        fresh.run({"gated": node("TestGated", fail=False), **preview("gated")})

    in_worker(worker_goes_on)
    asking.join(30)
    assert seen == [("at the end of the prompt", True)] and answers == [(False, [])]


def test_a_worker_that_is_gone_is_told_instead_of_waited_for(fresh, gate, monkeypatch) -> None:
    module = fresh.part("nodes.boundary")
    for name in ("SILENT_SECONDS", "DEAD_SECONDS"):
        monkeypatch.setattr(module, name, 0.2)
    done: list[str] = []
    for work in (module.BOUNDARY.done, module.BOUNDARY.everything_forgotten):
        with pytest.raises(RuntimeError, match="start ComfyUI again"):
            asyncio.run(work(done.append))
    in_worker(between_prompts, fresh)
    assert done == []  # nor when nobody reckons with it any more


def test_work_that_fails_fails_no_prompt(fresh, gate) -> None:
    def broken(moment: str) -> None:
        raise IndexError("of a model that is gone")

    boundary = fresh.part("nodes.boundary").BOUNDARY
    worker, failures = start(fresh)
    answer = boundary.submit(broken)
    gate.go.set()
    worker.join()
    assert failures == [] and isinstance(answer.exception(5), IndexError)
    answer = boundary.submit(broken)
    between_prompts(fresh)
    assert isinstance(answer.exception(0), IndexError)


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
