"""A warm-up in the real host: what it loads and caches, who may see it, what is kept of it."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.tests import official
from pack.tests.graphs import node, text_to_image

Graph = dict[str, Any]


class Queue:
    """ComfyUI's queue and worker, one prompt at a time; messages arrive when it is through."""

    def __init__(self, host: Any) -> None:
        self.host, self.queue = host, host.server.prompt_queue
        self.sent: list[tuple[str, Any, str | None]] = []

    def begin(self, prompt: Graph, **request: Any) -> Any:
        """Queue a warm-up."""
        begin = self.host.part("nodes.warmup").begin
        run, _ = self.host.loop.run_until_complete(
            begin({"prompt": copy.deepcopy(prompt), **request})
        )
        return run

    def work(self) -> Graph:
        """Run what comes first, as ComfyUI's worker does; return its prompt."""
        item, number = self.queue.get(timeout=1)
        executor, status = self.host.executor, self.queue.ExecutionStatus
        executor.execute(item[2], item[1], item[3], item[4])
        said = "success" if executor.success else "error"
        ended = status(said, executor.success, executor.status_messages)
        self.queue.task_done(number, executor.history_result, ended, lambda prompt: prompt[:5])
        self.sent.append(("executing", {"node": None, "prompt_id": item[1]}, item[3]["client_id"]))
        self.deliver()
        return item[2]

    def deliver(self) -> None:
        """Bring messages to those that they are for."""
        for event, data, sid in self.sent:
            for name, socket in list(self.host.server.sockets.items()):
                if sid in (None, name):
                    binary = isinstance(data, (bytes, bytearray))
                    message = {"type": event, "data": data}
                    sending = socket.send_bytes(data) if binary else socket.send_json(message)
                    self.host.loop.run_until_complete(sending)
        self.sent.clear()


@pytest.fixture
def queue(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """The host with empty caches, whose messages the queue brings."""
    made = Queue(fresh)
    monkeypatch.setattr(
        fresh.server,
        "send_sync",
        lambda event, data, sid=None: made.sent.append((event, data, sid)),
    )
    monkeypatch.setattr(fresh.part("nodes.warmup").Latest, "run", None)
    yield made
    made.queue.wipe_queue()
    made.queue.wipe_history()
    fresh.server.sockets.clear()
    fresh.server.client_id = "pytest"
    fresh.part("nodes.warmup").forget()


@pytest.fixture
def at_start(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The setting that warms up when ComfyUI starts, and the module."""
    warmup = queue.host.part("nodes.warmup")
    wanted = queue.host.part("nodes.settings").Settings(warm_up=warmup.WARM_UP_START)
    monkeypatch.setattr(warmup, "settings", lambda: wanted)
    return warmup


def test_it_loads_encodes_samples_once_and_the_real_run_goes_on_from_there(queue: Queue) -> None:
    host = queue.host
    before = set((host.base / "output").rglob("*"))
    run = queue.begin(text_to_image(steps=12))
    run_kept = set(run.form.kept) - {"negative"}
    prompt = queue.work()
    assert (run.state, run.error, run.problems) == ("done", "", [])
    assert prompt["sampler"]["inputs"]["steps"] == 1
    assert {m["kind"] for m in run.result["models"]} >= {"diffusion model", "text encoder", "VAE"}
    assert (run.result["encoded"], run.result["stored"], run.result["known"]) == (2, 2, 0)
    assert host.store.usage().memory.entries == 2
    assert set((host.base / "output").rglob("*")) == before
    assert queue.queue.get_history() == {} and host.server.sockets == {}
    host.run(text_to_image(seed=2))
    (cached,) = [data["nodes"] for event, data, _ in queue.sent if event == "execution_cached"]
    assert {"unet", "clip", "vae", "positive", "latent", "shift"} == run_kept & set(cached)


def test_the_sampler_does_one_step(queue: Queue) -> None:
    import comfy.utils

    steps: list[int] = []
    comfy.utils.set_progress_bar_global_hook(lambda done, total, *_, **__: steps.append(total))
    try:
        assert queue.begin(text_to_image(steps=12)).state == "waiting"
        queue.work()
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert steps and set(steps) == {1}


def test_a_sampler_that_shows_its_picture_runs_and_leaves_no_file(
    queue: Queue, monkeypatch
) -> None:
    host = queue.host
    temp = Path(host.folder_paths.get_temp_directory())

    class ShowingSampler(host.nodes.KSampler):
        OUTPUT_NODE, FUNCTION, STEPS = True, "show", []

        def show(self, steps: int, **inputs: Any) -> Any:
            self.STEPS.append(steps)
            temp.mkdir(exist_ok=True)
            (temp / "shown.png").touch()
            shown = [{"type": "temp", "subfolder": "", "filename": "shown.png"}]
            return {"ui": {"images": shown}, "result": self.sample(steps=steps, **inputs)}

    monkeypatch.setitem(host.nodes.NODE_CLASS_MAPPINGS, "ShowingSampler", ShowingSampler)
    graph = text_to_image(steps=12)
    graph["sampler"]["class_type"] = "ShowingSampler"
    run = queue.begin(graph)
    queue.work()
    assert (run.state, ShowingSampler.STEPS, run.report()["left_out"]) == ("done", [1], [])
    assert not (temp / "shown.png").exists()


def test_a_node_that_does_not_run_is_named_in_the_report(queue: Queue, monkeypatch) -> None:
    class SavingSampler(queue.host.nodes.KSampler):
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> Any:  # noqa: N802
            required = queue.host.nodes.KSampler.INPUT_TYPES()["required"]
            return {"required": {**required, "save_prefix": ("STRING", {})}}

    monkeypatch.setitem(queue.host.nodes.NODE_CLASS_MAPPINGS, "SavingSampler", SavingSampler)
    graph = text_to_image()
    graph["sampler"]["class_type"] = "SavingSampler"
    graph["sampler"]["inputs"]["save_prefix"] = "x"
    run = queue.begin(graph)
    queue.work()
    assert (run.state, run.result["encoded"]) == ("done", 2)
    left_out = ['"VAEDecode" (decode)', '"SavingSampler" (sampler)']
    assert run.report()["left_out"] == left_out


ODD = [
    *((event, data) for event in ("odd", "progress", "executed") for data in ("text", None, [1])),
    *((event, None) for event in ("executing", "execution_cached", "status", "execution_error")),
    *((event, {}) for event in ("progress", "executed", "execution_interrupted", "executing")),
    ("execution_interrupted", {"prompt_id": "another"}),
    ("qwen_vram.cache", {"odd": 1}),
    ("progress", {"prompt_id": "own", "value": 3}),
    ("executed", {"prompt_id": "own"}),
    ("executed", {"prompt_id": "own", "node": "sampler", "output": {"a": [{"type": "temp"}, 7]}}),
    ("execution_cached", {"prompt_id": "own", "nodes": 7}),
    ("executing", {"prompt_id": "own", "display_node": "nobody", "node": "nobody"}),
]


def test_odd_messages_of_other_packs_do_not_end_the_server_nor_the_warm_up(queue: Queue) -> None:
    run = queue.begin(text_to_image())
    for event, data in ODD:
        if isinstance(data, dict) and data.get("prompt_id") == "own":
            data = {**data, "prompt_id": run.id}
        queue.sent.append((event, data, None))
    queue.deliver()
    assert run.state == "waiting", "the interruption was another prompt's"
    queue.work()
    assert (run.state, run.error) == ("done", "")
    assert queue.queue.get_history() == {} and queue.host.server.sockets == {}


def test_a_model_that_cannot_tell_its_size_costs_the_result_alone(
    queue: Queue, monkeypatch
) -> None:
    def broken() -> None:
        raise RuntimeError("of another pack")

    monkeypatch.setattr(queue.host.part("nodes.warmup_run"), "resident_models", broken)
    run = queue.begin(text_to_image())
    queue.work()
    assert (run.state, run.report()["code"]) == ("failed", "not_followed")
    assert queue.queue.get_history() == {} and queue.host.server.sockets == {}
    assert not queue.host.part("nodes.warmup").Latest.active()


def test_a_file_on_another_drive_is_not_ours(queue: Queue, monkeypatch, tmp_path) -> None:
    module = queue.host.part("nodes.warmup_run")
    away = tmp_path / "away.png"
    away.touch()

    def drives(paths: Any) -> str:
        raise ValueError("Paths don't have the same drive")

    run = queue.begin(text_to_image())
    run._temporary = [{"type": "temp", "filename": str(away)}]
    monkeypatch.setattr(module.os.path, "commonpath", drives)
    run.cancel()
    assert (run.state, run.code) == ("cancelled", "") and away.exists()


@pytest.mark.parametrize(
    "name",
    ["image_qwen_Image_2512", "image_qwen_image_edit_2509", "image_qwen_image_edit_2511"],
)
def test_official_templates_keep_every_encode_and_sample_one_step(host: Any, name: str) -> None:
    (route,) = [r for r in host.server.routes if (r.method, r.path) == ("GET", "/object_info")]
    told = host.loop.run_until_complete(route.handler(None))
    graph = official.template(name, json.loads(told.text))
    facts_of = host.part("nodes.warmup").facts_of
    form = host.part("core.warmup").warm_up_form(graph, {i: facts_of(graph, i) for i in graph})
    made = form.prompt
    outputs = {n["class_type"] for i, n in made.items() if facts_of(made, i).output_node}
    assert outputs == {"QwenVRAMWarmupSink"} and form.left_out == ()
    samplers = [i for i, n in graph.items() if n["class_type"] == "KSampler"]
    assert samplers and [made[i]["inputs"]["steps"] for i in samplers] == [1] * len(samplers)
    stock = host.part("nodes.provider").STOCK_NODES
    encodes = {i for i, n in graph.items() if n["class_type"] in stock}
    assert len(encodes) >= 2 and encodes <= form.kept
    assert all(made[i] == graph[i] for i in encodes)
    (decode,) = [i for i, n in graph.items() if n["class_type"] == "VAEDecode"]
    assert [decode, 0] in [n["inputs"].get("value") for n in made.values()]


def test_a_pin_that_is_lost_is_told_before_anything_runs(queue: Queue) -> None:
    graph = text_to_image()
    graph["positive"]["_meta"] = {"title": "Prompt", "qwen_vram": {"pin": {"content": "0" * 64}}}
    with pytest.raises(ValueError, match='"Prompt" .positive.: .*not on this machine'):
        queue.begin(graph)
    assert queue.queue.get_tasks_remaining() == 0
    assert not queue.host.part("nodes.warmup").Latest.active()


def test_a_run_that_keeps_nothing_warms_up_without_storing(queue: Queue) -> None:
    private = {"extra_data": {"qwen_vram": {"keep_nothing": True}}}
    run = queue.begin(text_to_image(), **private)
    queue.work()
    assert (run.state, run.result["encoded"], run.result["stored"]) == ("done", 2, 0)
    assert queue.host.store.usage().memory.entries == 0


def test_an_output_that_cannot_run_is_told_and_the_others_are_warmed(queue: Queue) -> None:
    graph = text_to_image()
    graph["other"] = node("VAELoader", vae_name="nothing.safetensors")
    graph["decode2"] = node("VAEDecode", samples=["sampler", 0], vae=["other", 0])
    graph["save2"] = node("SaveImage", images=["decode2", 0], filename_prefix="x")
    run = queue.begin(graph)
    queue.work()
    assert run.state == "done"
    assert [p for p in run.problems if p.startswith('"VAELoader" (other): Value not in list')]


def test_a_run_that_comes_while_it_is_checked_has_it_give_way(queue: Queue, monkeypatch) -> None:
    warmup = queue.host.part("nodes.warmup")
    original = warmup.execution.validate_prompt

    async def meanwhile(*given: Any) -> Any:
        queue.host.server.trigger_on_prompt({"prompt": {}})
        return await original(*given)

    monkeypatch.setattr(warmup.execution, "validate_prompt", meanwhile)
    assert queue.begin(text_to_image()).state == "cancelled"
    assert queue.queue.get_tasks_remaining() == 0


def test_a_stop_between_queue_and_start_is_not_lost(queue: Queue, monkeypatch) -> None:
    run = queue.begin(text_to_image())
    item, number = queue.queue.get(timeout=1)
    interrupted = []
    monkeypatch.setattr(queue.queue, "interrupt_if_running", interrupted.append)
    run.cancel()
    start = ("execution_start", {"prompt_id": run.id}, run.client_id)  # ComfyUI clears the flag
    queue.sent.append(start)
    queue.deliver()
    assert interrupted == [run.id, run.id] and run.report()["cancelling"]
    queue.sent.append(("execution_interrupted", {"prompt_id": run.id}, run.client_id))
    queue.queue.task_done(number, {}, None)
    queue.deliver()
    assert run.state == "cancelled" and queue.queue.get_history() == {}


def test_who_takes_its_private_id_cannot_make_it_last_for_ever(queue: Queue) -> None:
    run, latest = queue.begin(text_to_image()), queue.host.part("nodes.warmup").Latest
    queue.host.server.sockets.pop(run.client_id)
    assert latest.active()
    queue.work()
    assert not latest.active() and run.report()["state"] == "failed"
    assert queue.queue.get_history() == {}


def test_one_that_somebody_takes_out_of_the_queue_is_over(queue: Queue) -> None:
    run = queue.begin(text_to_image())
    assert run.report()["state"] == "waiting"
    queue.queue.wipe_queue()
    queue.deliver()
    assert run.state == "cancelled" and queue.host.server.sockets == {}


def test_the_prompt_is_kept_for_the_next_start_and_warmed_up_then(queue: Queue, at_start) -> None:
    graph = text_to_image(text="a kept fox")
    at_start.keep(graph)
    assert os.name == "nt" or at_start.SAVED.stat().st_mode & 0o077 == 0
    queue.host.loop.run_until_complete(at_start.warm_up_saved())
    assert queue.work()["positive"] == graph["positive"]
    assert at_start.Latest.run.report()["state"] == "done"
    assert at_start.Latest.run.report()["percent"] == 100
    assert at_start._on_startup in queue.host.server.app.on_startup
    routes = queue.host.part("nodes.routes")
    assert routes.remove(routes.Wish(everything=True))["failed"] == []
    assert not at_start.SAVED.exists()


@pytest.mark.parametrize("meta", [{"qwen_vram": {"keep_nothing": "this run keeps nothing"}}])
def test_nothing_private_is_kept(at_start, meta: Any) -> None:
    graph = text_to_image()
    graph["negative"]["_meta"] = meta
    at_start.keep(graph)
    assert not at_start.SAVED.exists()


def test_without_the_setting_nothing_is_kept_and_what_was_goes(queue: Queue, at_start) -> None:
    at_start.keep(text_to_image())
    assert at_start.SAVED.exists()
    queue.host.loop.run_until_complete(queue.host.part("nodes.warmup").warm_up_saved())
    assert at_start.SAVED.exists()
    for change in ({"warm_up": "off"}, {"keep": "nothing"}):
        at_start.keep(text_to_image())
        usual = at_start.settings()._replace(**change)
        before, at_start.settings = at_start.settings, lambda usual=usual: usual
        at_start.keep(text_to_image())
        queue.host.loop.run_until_complete(at_start.warm_up_saved())
        at_start.settings = before
        assert not at_start.SAVED.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "7", "\x00", '{"version": 2, "prompt": {}}', '{"version": 1}', "NaN"),
        '{"version": 1, "prompt": {"1": 3}}',
        '{"version": 1, "prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}',
    ],
)
def test_a_damaged_or_foreign_file_costs_one_line_in_the_log(
    queue: Queue, at_start, caplog, text: str
) -> None:
    at_start.SAVED.parent.mkdir(parents=True, exist_ok=True)
    at_start.SAVED.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        queue.host.loop.run_until_complete(at_start.warm_up_saved())
    (line,) = [r.getMessage() for r in caplog.records if r.name == "qwen_vram"]
    assert line.startswith("The saved workflow is not warmed up: ")
    assert queue.queue.get_tasks_remaining() == 0


def test_every_class_of_comfyui_tells_its_facts(host: Any) -> None:
    facts_of = host.part("nodes.warmup").facts_of
    known = {
        name: facts_of({"1": node(name)}, "1") for name in list(host.nodes.NODE_CLASS_MAPPINGS)
    }
    assert known["SaveImage"].output_node and not known["KSampler"].output_node
    for name in ("KSampler", "KSamplerAdvanced", "BasicScheduler"):
        assert (
            known[name].inputs["steps"].type == "INT" and known[name].inputs["steps"].minimum == 1
        )
    assert known["QwenVRAMCachedTextEncode"].inputs["clip"].lazy
    assert known["SplitSigmas"].outputs == ("SIGMAS", "SIGMAS")
    assert json.dumps({name: f.outputs for name, f in known.items()})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "ram"),
        ({"cache_classic": True}, "classic"),
        ({"cache_lru": 10}, "lru"),
        ({"cache_none": True}, "none"),
    ],
)
def test_it_tells_how_comfyui_keeps_results(host: Any, monkeypatch, given, expected) -> None:
    module = host.part("nodes.warmup_run")
    usual = {"cache_classic": False, "cache_lru": 0, "cache_none": False}
    for name, value in (usual | given).items():
        monkeypatch.setattr(module.args, name, value)
    assert module.host_cache() == expected
