"""Fitting a model to the memory: limits, room, metadata, and models that cannot be sliced."""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.core.budget import Memory
from pack.tests.graphs import node, text_to_image
from pack.tests.host import RunError
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, transformer, within
from pack.tests.nodes.test_warmup import Queue
from PIL import Image

GB = 1_000_000_000
CUDA = torch.device("cuda:0")


# ------------------------------------------------------------------------------- the metadata
def queued(host: Any, graph: dict[str, Any], **extra: Any) -> list[Path]:
    """Run a graph as ComfyUI's worker does, from its queue; returns the pictures that it saved."""
    queue, prompt_id = host.server.prompt_queue, uuid.uuid4().hex
    folder = Path(host.folder_paths.get_output_directory())
    before = set(folder.rglob("*.png"))
    queue.put((0, prompt_id, graph, {"client_id": "pytest", **extra}, ["save"]))
    item, number = queue.get(timeout=1)
    host.executor.execute(item[2], item[1], item[3].copy(), item[4])
    status = queue.ExecutionStatus("success", host.executor.success, [])
    queue.task_done(number, host.executor.history_result, status, lambda prompt: prompt[:5])
    queue.wipe_history()
    return sorted(set(folder.rglob("*.png")) - before)


@pytest.mark.parametrize("build", [within, fitted])
def test_the_picture_says_what_was_done_if_the_client_sent_a_workflow(host, build) -> None:
    graph = build(text_to_image(size=32, seed=hash(build.__name__) % 1000))
    workflow = {"nodes": [{"id": 1}], "links": []}
    model = transformer(host, graph)
    with blocks_fail(model, Faults({2})):
        (path,) = queued(host, graph, extra_pnginfo={"workflow": workflow})
    written = Image.open(path).info
    assert json.loads(written["workflow"]) == workflow  # as it was: it can be opened again
    (said,) = json.loads(written["qwen_vram"]).items()
    assert said[0] == "sampler" and said[1]["done"] == "as asked"
    assert said[1]["forward_passes_repeated"] == 1 and said[1]["exactness"] == "exact"
    assert set(said[1]["versions"]) == {"qwen_vram", "comfyui", "torch"}
    assert said[1]["versions"]["qwen_vram"][0].isdigit()


def test_a_patch_that_did_not_run_again_says_so(host, monkeypatch) -> None:
    told: list[str] = []
    tell = lambda text, node_id, sid: told.append(text)  # noqa: E731
    monkeypatch.setattr(host.server, "send_progress_text", tell)
    graph, info = fitted(text_to_image(size=32)), {"workflow": {"nodes": [{"id": 1}]}}
    queued(host, graph, extra_pnginfo=info)
    graph["sampler"]["inputs"]["seed"] += 1
    (path,) = queued(host, graph, extra_pnginfo=info)
    assert "qwen_vram" not in Image.open(path).info
    assert told[-1] == (
        "as asked (exact) · not in the picture's metadata: ComfyUI did not run this node again"
    )


def test_without_a_workflow_the_node_says_so(host) -> None:
    assert "qwen_vram" not in Image.open(queued(host, within(text_to_image(size=32)))[0]).info
    shown = host.run(within(small())).status("sampler")
    assert shown["text"].endswith("not in the picture's metadata: the client sent no workflow")


@pytest.mark.parametrize("build", [within, fitted])
def test_a_list_of_latents_has_what_was_done_for_each(host, build) -> None:
    graph = text_to_image(size=32, seed=hash(build.__name__) % 1000)
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["each"] = node("RebatchLatents", latents=["latent", 0], batch_size=1)
    graph["sampler"]["inputs"].update(latent_image=["each", 0], steps=1)
    graph = build(graph)
    info = {"workflow": {"nodes": [{"id": 1}]}}
    with blocks_fail(transformer(host, graph), Faults({5})):  # in the second
        paths = queued(host, graph, extra_pnginfo=info)
    for path in paths:
        said = json.loads(Image.open(path).info["qwen_vram"])["sampler"]
        assert [one["forward_passes_repeated"] for one in said] == [0, 1]


def test_a_patch_in_the_cache_keeps_no_workflow(host) -> None:
    """Only the newest prompt's is known."""
    outcome = host.part("nodes.outcome")
    graph, info = fitted(text_to_image(size=32)), {"workflow": {"nodes": [{"id": 1}]}}
    queued(host, graph, extra_pnginfo=info)
    patched = host.executor.caches.outputs.get_local("fit").outputs[0][0]
    (wrapper,) = patched.wrappers["outer_sample"]["qwen_vram.fit"]
    assert vars(wrapper.__self__.told.metadata).keys() == {"prompt_id"}
    assert outcome._Info.info["workflow"] == info["workflow"]
    queued(host, within(text_to_image(size=32)), extra_pnginfo={})
    assert not (outcome._Info.info or {}).get("workflow")


def test_without_a_prompt_a_sampler_works_all_the_same(host) -> None:
    """Called by a script: nothing runs in ComfyUI's executor."""
    host.restart()
    outputs = host.run(small()).outputs
    sampler = host.nodes.NODE_CLASS_MAPPINGS["QwenVRAMSampler"]
    positive, negative, empty = (outputs[name][0][0] for name in ("positive", "negative", "latent"))
    model = outputs["shift"][0][0]
    sampler.hidden = SimpleNamespace(extra_pnginfo={"workflow": {"nodes": []}})
    given = (5, 2, 2.5, "euler", "simple", positive, negative, empty, 1.0, "exact only", 0.0, "")
    made = sampler.execute(model, *given)
    assert made.args[0]["samples"].isfinite().all() and "runs no prompt" in made.args[1]
    fit = host.nodes.NODE_CLASS_MAPPINGS["QwenVRAMFit"]
    fit.hidden = sampler.hidden
    assert fit.execute(model, "exact only", 0.0).args


# -------------------------------------------------------------------------------- the warm-up
def test_the_warm_up_samples_one_step(fresh, monkeypatch) -> None:
    queue = Queue(fresh)
    keep = lambda event, data, sid=None: queue.sent.append((event, data, sid))  # noqa: E731
    monkeypatch.setattr(fresh.server, "send_sync", keep)
    try:
        run = queue.begin(within(text_to_image(size=32, steps=12)))
        prompt = queue.work()
        assert run.state == "done" and prompt["sampler"]["class_type"] == "QwenVRAMSampler"
        assert prompt["sampler"]["inputs"]["steps"] == 1
    finally:
        queue.queue.wipe_queue()
        queue.queue.wipe_history()
        fresh.server.sockets.clear()
        fresh.server.client_id = "pytest"
        fresh.part("nodes.warmup").forget()


# ----------------------------------------------------------------- models that are not sliced
def test_a_model_that_cannot_be_sliced_is_repeated_all_the_same(host, monkeypatch) -> None:
    slicing = host.part("nodes.slicing")
    monkeypatch.setattr(slicing, "install", lambda patcher, plans: "It is of another kind.")
    stock = latent(host.run(small()))
    with blocks_fail(transformer(host, small()), Faults({0, 1, 2})):
        run = host.run(within(small()))
    status = run.status("sampler")
    assert status["forward_passes_repeated"] == 3
    assert latent(run).equal(stock) and status["exactness"] == "exact"
    assert "It is of another kind." in status["text"] and "slices" not in status["done"]
    assert status["need_bytes"] > 0


def test_what_a_pass_is_comes_from_its_tensors(host) -> None:
    """An odd size, a batch, two references and a text."""
    work_of = host.part("nodes.workload").work_of
    model = transformer(host, small())
    base = host.executor.caches.outputs.get_local("unet").outputs[0][0].model
    x = torch.zeros(3, 16, 1, 5, 8)
    references = [torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 16, 1, 3, 3)]
    work = work_of(base, True, x, torch.zeros(3, 7, 64), {"ref_latents": references})
    assert (work.batch, work.tokens, work.text_tokens) == (3, 12, 7)
    assert work.reference_tokens == 16 + 4 and not work.timestep_zero
    assert (work.width, work.heads, work.blocks) == (model.inner_dim, 4, 2)
    assert work.host_estimate is None and work.element_size in (2, 4)
    more = {"ref_latents": references, "ref_latents_method": "index_timestep_zero"}
    assert work_of(base, True, x, None, more).timestep_zero
    assert work_of(base, False, x, None, more).host_estimate > 0


def test_a_compiled_model_runs_whole_and_says_so(host) -> None:
    """Slices would compile it anew; here it is not really compiled, only marked as ComfyUI does."""
    from comfy.patcher_extension import WrappersMP

    model = transformer(host, small())
    stock = latent(host.run(small()))
    patcher = host.executor.caches.outputs.get_local("shift").outputs[0][0]
    kind, key = WrappersMP.APPLY_MODEL, "torch.compile"
    patcher.add_wrapper_with_key(kind, key, lambda call, *args, **more: call(*args, **more))
    try:
        with blocks_fail(model, Faults({0, 1, 2})):
            run = host.run(within(small()))
    finally:
        patcher.remove_wrappers_with_key(kind, key)
    status = run.status("sampler")
    assert latent(run).equal(stock) and status["forward_passes_repeated"] == 3
    assert "torch.compile" in status["text"] and "slices" not in status["done"]


# ------------------------------------------------------------------------------ several GPUs
def test_a_gpu_s_thread_leaves_alone_what_belongs_to_all(host, monkeypatch) -> None:
    recovery, management = host.part("nodes.recovery"), host.part("nodes.recovery").comfy
    calls: list[str] = []
    monkeypatch.setattr(
        management.model_management, "reset_cast_buffers", lambda: calls.append("cast buffers")
    )
    monkeypatch.setattr(
        management.model_management, "soft_empty_cache", lambda: calls.append("cache")
    )
    recovery.recover([], alone=False)
    assert calls == ["cache"]
    recovery.recover([], alone=True)
    assert calls == ["cache", "cast buffers", "cache"]


# --------------------------------------------------------------------- dynamic VRAM, invented
class Pages:
    """The pages of a dynamic model: two modules of three pages, the middle one shared."""

    def __init__(self) -> None:
        self.pins, self.freed, self.watermark = [1, 2, 1], 0, 0  # nothing may come back
        self.resident = 3 * 32 * 2**20

    def get_residency(self) -> list[int]:
        return [1 | (2 if count else 0) for count in self.pins]

    def unpin(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            self.pins[page] = max(0, self.pins[page] - 1)

    def free_memory(self, size: int) -> None:
        self.freed += size

    def prioritize(self) -> None:
        self.watermark = 10 * GB

    def set_watermark(self, size: int) -> None:
        self.watermark = size

    def loaded_size(self) -> int:
        return self.resident


class Dynamic:
    """A ModelPatcherDynamic that failed between a cast and its end, and in a prefetch."""

    load_device = CUDA

    def __init__(self) -> None:
        self.pages = Pages()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        for number, module in enumerate(self.model):
            module._v = (self.pages, number, 2)
        self.model[1]._prefetch = {"signature": "of the page", "resident": True}
        self.model.dynamic_vbars = {CUDA: self.pages}

    def is_dynamic(self) -> bool:
        return True

    def model_size(self) -> int:
        return 3 * GB


def test_pages_that_a_failed_pass_left_pinned_are_unpinned(host) -> None:
    patcher = Dynamic()
    host.part("nodes.recovery").unpin(patcher)
    assert patcher.pages.pins == [0, 0, 0]
    assert not any(hasattr(module, "_prefetch") for module in patcher.model.modules())


class FromCUDA(RuntimeError):
    """As torch.AcceleratorError: cudaErrorInvalidValue."""

    error_code = 1


def test_what_dynamic_vram_raises_for_want_of_memory_is_known(host, monkeypatch) -> None:
    import comfy.memory_management

    is_oom = host.part("nodes.recovery").is_oom
    own = (RuntimeError("VRAM grow failed: 56659968 bytes"), FromCUDA("CUDA error: invalid value"))
    assert is_oom(torch.OutOfMemoryError("no")) and not any(map(is_oom, own))
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    assert all(map(is_oom, own))
    assert not is_oom(RuntimeError("shapes")) and not is_oom(ValueError("VRAM grow failed"))


def test_pages_that_left_come_back_after_a_failure(host) -> None:
    """ComfyUI's pages stay below their watermark, which a failure leaves at nothing."""
    recovery = host.part("nodes.recovery")
    patcher = Dynamic()
    recovery.recover([patcher], alone=False)
    assert patcher.pages.watermark == 10 * GB and patcher.pages.pins == [0, 0, 0]
    recovery.stream_more(patcher, 1000)
    assert patcher.pages.freed == 0 and patcher.pages.watermark == 10 * GB


# ---------------------------------------------------------------------------------- the limit
@pytest.fixture
def card(host, monkeypatch) -> Any:
    """A card of 12 GB of which torch has 1 GB reserved and the driver takes half a GB."""
    card = SimpleNamespace(fraction=0.9, allocated=1 * GB, own=1_500_000_000, set_to=[])
    card.loaded = []  # other models
    module = host.part("nodes.vram_limit")

    def set_fraction(fraction: float, device: torch.device) -> None:
        card.fraction = fraction
        card.set_to.append(fraction)

    for name, value in {
        "mem_get_info": lambda _: (10 * GB, 12 * GB),
        "memory_reserved": lambda _: 1 * GB,
        "memory_allocated": lambda _: card.allocated,
        "get_per_process_memory_fraction": lambda _: card.fraction,
        "set_per_process_memory_fraction": set_fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "loaded", lambda: [(None, other) for other in card.loaded])
    monkeypatch.setattr(module, "device_memory", lambda _: SimpleNamespace(own_bytes=card.own))
    return card


def limit(host: Any, size: int, device: torch.device = CUDA) -> Any:
    """A limit of that many bytes."""
    return host.part("nodes.vram_limit").VRAMLimit(device, size)


def test_torch_is_limited_for_the_run_alone(host, card) -> None:
    held = limit(host, 6 * GB)
    with pytest.raises(KeyError), held:
        assert card.fraction == pytest.approx(5.5 / 12, abs=1e-5)
        assert held.room() == 4.5 * GB
        raise KeyError("an interrupt, for example")
    assert card.fraction == 0.9


def test_pages_and_torch_share_the_limit(host, card) -> None:
    patcher = Dynamic()
    with limit(host, 6 * GB) as held:
        held.fit_weights(patcher, 2 * GB)
        assert patcher.pages.watermark == pytest.approx(
            2.5 * GB
        )  # 6 less the driver's, torch's own, the need
        assert card.fraction == pytest.approx(3.0 / 12, abs=1e-5)
        held.fit_weights(patcher, 9 * GB)
        assert patcher.pages.watermark == 0
        patcher.model.append(torch.nn.Linear(10_000, 12_500, bias=False, device="meta"))
        held.fit_weights(patcher, 2 * GB)
        assert patcher.pages.watermark == pytest.approx(
            2 * GB
        )  # half a GB for two weights while they are cast


def test_pages_of_other_models_count_within_the_limit(host, card) -> None:
    """They leave by themselves only when the whole card is full."""
    patcher, other, control = Dynamic(), Dynamic(), Dynamic()
    other.pages.resident, control.pages.resident, patcher.pages.resident = GB // 2, GB // 4, 0
    control.model_size = lambda: GB
    card.own += GB // 2 + GB // 4
    card.loaded = [patcher, other, control]
    with limit(host, 6 * GB) as held:
        assert held.room() == 3.75 * GB  # 6 less the driver's, torch's own, all pages
        assert held.room([patcher]) == 3.75 * GB and held.room([patcher, control]) == 4 * GB
        held.fit_weights(patcher, 2 * GB, [patcher, control])
        # 6 less the driver's, torch's own, the other's pages and the need; three to one by size
        marks = patcher.pages.watermark, control.pages.watermark
        assert marks == pytest.approx((1.5 * GB, 0.5 * GB), abs=1000)
        assert other.pages.watermark == 0 and card.fraction == pytest.approx(3.0 / 12, abs=1e-5)


def test_within_a_limit_other_dynamic_models_can_be_unloaded(host, monkeypatch) -> None:
    workload = host.part("nodes.workload")
    own, other = Dynamic(), Dynamic()
    own.get_free_memory = lambda device: 9 * GB
    own.loaded_size = lambda: 5 * GB
    other.loaded_size = lambda: 2 * GB
    entries = [(SimpleNamespace(device=CUDA), patcher) for patcher in (own, other)]
    monkeypatch.setattr(workload.loaded_models, "loaded", lambda: entries)
    assert workload.memory_of(own, [], (), None) == Memory(9 * GB, 0, 0, 0)
    assert workload.memory_of(own, [], (), GB) == Memory(GB, 2 * GB, 0, 0)
    assert workload.memory_of(own, [own, other], (), GB) == Memory(GB, 0, 0, 0)


def test_without_dynamic_vram_the_load_leaves_more_in_ram(host, card, monkeypatch) -> None:
    import comfy.model_management as management

    unloaded: list[int] = []
    patcher = SimpleNamespace(
        load_device=CUDA,
        offload_device="cpu",
        is_dynamic=lambda: False,
        loaded_size=lambda: 0,
        model=SimpleNamespace(memory_required=lambda shape: shape[0] * GB),
        partially_unload=lambda device, size: unloaded.append(size),
    )
    monkeypatch.setattr(management, "get_free_memory", lambda _: 10 * GB)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: GB // 2)
    held = limit(host, 6 * GB)
    planned = held.load_shape(patcher, [1, 16, 64, 64], 2 * GB)
    # ComfyUI loads what is free less what this needs and its reserve: 3.5 GB of weights
    assert 10 * GB - patcher.model.memory_required(planned) - GB // 2 == pytest.approx(3.5 * GB)
    assert planned[1:] == [16, 64, 64]
    patcher.loaded_size = lambda: 4 * GB
    card.allocated = 4 * GB
    held.fit_weights(patcher, 2 * GB)
    assert unloaded == [GB // 2]


@pytest.mark.parametrize("size", [12 * GB, 80 * GB])
def test_a_limit_above_what_there_is_is_said_and_left(host, card, size: int) -> None:
    with limit(host, size) as held:
        assert "it changes nothing" in held.note and held.room() is None
        assert held.load_shape(None, [1, 2], 5) == [1, 2]
    assert card.set_to == []


@pytest.mark.parametrize(
    ("kind", "memory"),
    [("mps", "Apple's shared memory"), ("privateuseone", "DirectML"), ("xpu", "Intel cards")],
)
def test_elsewhere_the_limit_is_said_to_hold_nothing(host, kind: str, memory: str) -> None:
    note = limit(host, GB, torch.device(kind, 0)).note
    assert note.startswith("the VRAM limit only decides how to run: PyTorch cannot limit ")
    assert memory in note and kind not in note


def test_a_limit_below_what_the_driver_takes_is_refused(host, card) -> None:
    with pytest.raises(ValueError, match="Set vram_limit higher"):
        limit(host, GB // 4)


def test_on_the_cpu_the_limit_only_decides_how_to_run(host) -> None:
    graph = text_to_image(size=160, steps=1)
    usual = latent(host.run(graph))
    run = host.run(within(graph, vram_limit=0.0006))
    status = run.status("sampler")
    assert (
        "PyTorch cannot limit how much RAM it takes" in status["text"]
        and "limit 0.6 MB" in status["text"]
    )
    assert "slices" in status["done"] and status["forward_passes_repeated"] == 0
    assert torch.allclose(latent(run), usual, atol=1e-2)


def test_the_final_error_names_the_limit(host) -> None:
    failing = blocks_fail(transformer(host, small()), Faults(range(100)))
    sentence = "vram_limit holds this run within 2.00 GB"
    with failing, pytest.raises(RunError, match=sentence):
        host.run(within(small(), vram_limit=2.0))


# ------------------------------------------------------------------------------- the peak
def test_the_peak_of_a_pass_is_counted_by_torch_on_a_card(host, card, monkeypatch) -> None:
    passes = host.part("nodes.passes")
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * GB)
    there, here = (SimpleNamespace(load_device=d) for d in (CUDA, torch.device("cpu")))
    assert passes._Peak(there, True).bytes() == 2 * GB and reset == [CUDA]
    assert passes._Peak(there, False).bytes() is None  # once for each kind of pass is enough
    assert passes._Peak(here, True).bytes() is None and reset == [CUDA]
    factors = iter([(0, 5), (GB // 2, 5)])  # of LoRAs, before and after: the pass brought them in
    with monkeypatch.context() as patch:
        patch.setattr(passes, "lora_bytes", lambda _: next(factors))
        assert passes._Peak(there, True).bytes() == 2 * GB - GB // 2
    said = host.run(within(small())).status("sampler")
    assert said["peak_bytes"] is None and "not measurable" in said["peak_is"]


# ---------------------------------------------------------------------------- making room
def test_other_models_leave_and_those_in_use_stay(host, monkeypatch) -> None:
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    other = ModelPatcher(torch.nn.Linear(1000, 1000), cpu, cpu)
    management.load_models_gpu([other])
    model = transformer(host, small())
    memory = Memory(9 * GB, GB, 0, 0)
    monkeypatch.setattr(host.part("nodes.passes"), "memory_of", lambda *_: memory)
    with blocks_fail(model, Faults({0})):
        run = host.run(within(small()))
    assert run.status("sampler")["done"] == "as asked, other models unloaded"
    loaded = [patcher.model for _, patcher in host.part("nodes.loaded_models").loaded()]
    assert other.model not in loaded and model in [own.diffusion_model for own in loaded]


def test_room_is_made_only_as_far_as_the_rung_allows(host, monkeypatch) -> None:
    """As predicted, before anything has failed: weights of others first, own ones then."""
    passes, recovery = host.part("nodes.passes"), host.part("nodes.recovery")
    freed: list[Any] = []
    monkeypatch.setattr(recovery, "unload_others", lambda device, used: freed.append("others"))
    monkeypatch.setattr(recovery, "stream_more", lambda patcher, size: freed.append(size))
    memory = Memory(free=1000, others=20_000, streamable=500_000, held=0)
    monkeypatch.setattr(passes, "memory_of", lambda *_: memory)
    run = host.run(within(small()))
    assert run.status("sampler")["done"] == "as asked, more of the model streamed"
    need = run.status("sampler")["need_bytes"]
    assert freed[0] == "others" and 0 < freed[1] <= need - 21_000


# ------------------------------------------------------------------------------ after a failure
@pytest.fixture
def eight_gb(host, monkeypatch, tmp_path) -> Any:
    """A card, invented: how much of it a pass finds, and above what need it runs out."""
    passes, place = host.part("nodes.passes"), host.part("nodes.place")
    card = SimpleNamespace(memory=Memory(6 * GB, 0, 0, 0), fits=2 * GB, tried=[], streamed=[])
    card.measured = host.part("core.measured").Measured(tmp_path / "a.json")
    scale = GB / 150_000  # the tiny model's bytes to those of the real one
    need = host.part("core.budget").need
    forward = passes.reductions.forward

    def scaled(work: Any, plan: Any, factor: float = 1.0) -> int:
        return round(scale * need(work, plan, factor))

    def limited(executor: Any, plan: Any, *arguments: Any, **more: Any) -> Any:
        card.tried.append((plan.projections, plan.attention))
        if card.needs(plan) > card.fits:
            raise torch.OutOfMemoryError("injected by a test")
        return forward(executor, plan, *arguments, **more)

    def begin(self: Any, work: Any, *rest: Any) -> None:
        card.needs = lambda plan: scaled(work, plan)
        usual(self, work, *rest)

    usual = place.Place.begin
    monkeypatch.setattr(place.Place, "begin", begin)
    monkeypatch.setattr(host.part("core.budget"), "need", scaled)
    monkeypatch.setattr(place, "TELLING", ("cpu",))
    for module in (place, passes):
        monkeypatch.setattr(module, "MEASURED", card.measured)
    monkeypatch.setattr(passes, "memory_of", lambda *_: card.memory)
    monkeypatch.setattr(passes.reductions, "forward", limited)
    monkeypatch.setattr(
        host.part("nodes.recovery"), "stream_more", lambda patcher, size: card.streamed.append(size)
    )
    return card


def picture() -> dict[str, Any]:
    """Of 96 px, so that slices need clearly less; one step."""
    graph = small(steps=1)
    graph["latent"]["inputs"].update(width=96, height=96)
    return graph


def test_what_needs_hardly_less_than_what_failed_is_not_tried(host, eight_gb) -> None:
    run = host.run(within(picture()))
    tried = eight_gb.tried
    assert tried[:2] == [(1, 1)] * 2  # again, since the numbers say that it fits
    assert run.status("sampler")["forward_passes_repeated"] == len(set(tried)) > 1
    assert len(set(tried)) <= 3 and run.status("sampler")["exactness"] == "exact up to rounding"


def test_without_the_numbers_for_it_nothing_is_tried_again(host, eight_gb) -> None:
    host.run(within(picture()))
    needed = eight_gb.needs(host.part("core.budget").Plan())
    eight_gb.tried.clear()
    eight_gb.measured._failures.clear()
    eight_gb.memory = Memory(round(0.95 * needed), 0, 0, 0)
    host.run(within(picture()))
    assert eight_gb.tried[0] == (1, 1) != eight_gb.tried[1]


def test_the_next_run_starts_where_the_last_one_ended(host, eight_gb) -> None:
    host.run(within(picture()))
    fits = eight_gb.tried[-1]
    eight_gb.tried.clear()
    run = host.run(within(picture()))
    assert set(eight_gb.tried) == {fits} and run.status("sampler")["forward_passes_repeated"] == 0
    eight_gb.memory, eight_gb.fits = Memory(9 * GB, 0, 0, 0), 9 * GB  # another program has ended
    eight_gb.tried.clear()
    assert host.run(within(picture())).status("sampler")["done"] == "as asked"


def test_weights_that_can_leave_do_so_in_one_step(host, eight_gb, monkeypatch) -> None:
    """Without dynamic VRAM: models of others, and as many of its own as lack."""
    freed: list[Any] = []

    def stream(patcher: Any, size: int) -> None:
        freed.append(size)
        eight_gb.fits = 9 * GB

    recovery = host.part("nodes.recovery")
    monkeypatch.setattr(recovery, "stream_more", stream)
    monkeypatch.setattr(recovery, "unload_others", lambda *_: freed.append("others"))
    eight_gb.fits, eight_gb.memory = 0, Memory(6 * GB, GB // 10, 3 * GB, 0)
    run = host.run(within(picture()))
    needed = run.status("sampler")["need_bytes"]
    assert eight_gb.tried == [(1, 1)] * 3  # two sides of CFG, one of them once more
    assert freed == ["others", needed // 4 - GB // 10]
    assert run.status("sampler")["done"] == "as asked, more of the model streamed"
    eight_gb.tried.clear()
    freed.clear()
    again = host.run(within(picture()))
    assert again.status("sampler")["forward_passes_repeated"] == 0 and len(eight_gb.tried) == 2
    assert freed == ["others", needed // 4 - GB // 10]  # at once, and only once


def limited(host: Any, monkeypatch: Any) -> Any:
    """A limit that is enforced on the CPU; returns the needs (bytes) that weights are `fitted_to`,
    how loads were `planned`, and the `loads` of ComfyUI."""
    import comfy.sampler_helpers

    fitted_to: list[int] = []
    planned: list[Any] = []
    loads: list[Any] = []
    load = comfy.sampler_helpers._prepare_sampling

    def loading(model: Any, noise_shape: Any, *rest: Any, **more: Any) -> Any:
        loads.append(list(noise_shape))
        return load(model, noise_shape, *rest, **more)

    monkeypatch.setattr(comfy.sampler_helpers, "_prepare_sampling", loading)

    class Limit:
        enforced, note, limit = True, "", 6 * GB

        def __init__(self, device: torch.device, limit: int) -> None:
            self.device = device

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def room(self, used: Any = ()) -> int:
            return 6 * GB

        def load_shape(self, model: Any, shape: list[int], need: int) -> list[int]:
            planned.append((model.load_device.type, list(shape), need))
            return [2 * shape[0], *shape[1:]]

        def fit_weights(self, model: Any, need: int, used: Any = ()) -> None:
            fitted_to.append(need)

    monkeypatch.setattr(host.part("nodes.fitting"), "VRAMLimit", Limit)
    return SimpleNamespace(fitted_to=fitted_to, planned=planned, loads=loads)


def test_a_limit_holds_after_a_failure_beside_the_model(host, eight_gb, monkeypatch) -> None:
    import comfy.samplers

    held, faults, whole = limited(host, monkeypatch), Faults({0}), comfy.samplers.cond_cat
    fitted_to = held.fitted_to
    monkeypatch.setattr(
        comfy.samplers, "cond_cat", lambda *a, **k: (faults.call(), whole(*a, **k))[1]
    )
    eight_gb.fits = 9 * GB
    run = host.run(within(picture(), vram_limit=6.0))
    assert len(fitted_to) == 2 and fitted_to[1] == fitted_to[0] + 512_000_000
    assert run.status("sampler")["calculations_repeated"] == 1


def test_after_a_failure_a_limit_divides_the_memory_anew(host, eight_gb, monkeypatch) -> None:
    """The pages of dynamic VRAM are prioritised then, which lifts the limit's watermark."""
    fitted_to = limited(host, monkeypatch).fitted_to
    eight_gb.fits = 9 * GB
    host.run(within(picture(), vram_limit=6.0))
    assert len(fitted_to) == 1  # when it was loaded
    with blocks_fail(transformer(host, picture()), Faults({0})):
        run = host.run(within(picture(), vram_limit=6.0))
    need = run.status("sampler")["need_bytes"]
    assert fitted_to[2:] == [need + need // 4] and run.status("sampler")["done"] == "as asked"


def test_a_load_within_a_limit_is_planned_for_what_passes_need(host, eight_gb, monkeypatch) -> None:
    held = limited(host, monkeypatch)
    eight_gb.fits = 9 * GB
    need = host.run(within(picture(), vram_limit=6.0)).status("sampler")["need_bytes"]
    assert held.planned == [("cpu", [1, 16, 1, 12, 12], need)] and held.fitted_to == [need]
    assert held.loads == [[2, 16, 1, 12, 12]]  # what the limit made of it


def test_predictions_learn_from_what_a_run_took(host, eight_gb, monkeypatch) -> None:
    """Here twice what was predicted, as if torch had counted it."""
    passes = host.part("nodes.passes")
    took: list[int] = []

    class Peak:
        def __init__(self, device: torch.device, wanted: bool) -> None:
            self.wanted = wanted

        def bytes(self) -> int | None:
            if self.wanted:
                took.append(2 * eight_gb.needs(host.part("core.budget").Plan()))
            return took[-1] if self.wanted else None

    monkeypatch.setattr(passes, "_Peak", Peak)
    eight_gb.fits = 9 * GB
    first = host.run(within(picture())).status("sampler")
    assert first["peak_bytes"] == max(took) and "peak " in first["text"]
    again = host.run(within(picture())).status("sampler")
    assert again["need_bytes"] > 1.3 * first["need_bytes"]


# -------------------------------------------------------------------------- what is really done
def test_nothing_is_said_of_what_could_not_be_done(host, monkeypatch) -> None:
    """Too little by the numbers, and nothing that could be unloaded or streamed."""
    passes, slicing = host.part("nodes.passes"), host.part("nodes.slicing")
    monkeypatch.setattr(slicing, "install", lambda patcher, plans: "It is of another kind.")
    monkeypatch.setattr(passes, "memory_of", lambda *_: Memory(0, 0, 0, 0))
    assert host.run(within(small())).status("sampler")["done"] == "as asked"
    failing = blocks_fail(transformer(host, small()), Faults(range(100)))
    with failing, pytest.raises(RunError) as caught:
        host.run(within(small()))
    text = str(caught.value)
    assert "- as asked: needs" in text
    assert not any(word in text for word in ("unloaded", "streamed", "released"))


def test_the_worst_that_was_done_is_told(host) -> None:
    """Passes of two shapes have two ladders: places on them cannot be compared."""
    budget, Record = host.part("core.budget"), host.part("nodes.outcome").Record
    plan = budget.Plan()
    exact = budget.Rung("as-asked", "as asked", budget.EXACT, plan, False, False, False)
    third = budget.Rung("attention-4", "slices", budget.ROUNDING, plan, True, True, False)
    tiles = budget.Rung("tiles-2", "tiles", budget.APPROXIMATE, plan, True, True, False)
    record = Record("allow approximations")
    for position, rung, need in [(0, exact, 1), (3, tiles, 2), (7, third, 3), (0, exact, 4)]:
        record.use(position, rung, need)
        record.took(rung, 10 * need)
    assert record.rung == tiles and (record.need, record.peak) == (2, 20)
    assert record.exactness() == "approximate"
    record.doubt("Somebody saw it.")
    assert record.exactness() == "approximate"


# ------------------------------------------------------------------------- what the host keeps
def test_threads_of_several_gpus_make_room_one_at_a_time(host, monkeypatch) -> None:
    """ComfyUI walks its list of loaded models by index."""
    passes, recovery = host.part("nodes.passes"), host.part("nodes.recovery")
    record = host.part("nodes.outcome").Record("exact only")
    limit = SimpleNamespace(device=None, enforced=False)
    run = passes.Passes("exact only", None, True, record, limit, ())
    inside, most = [], []

    def touches(*_: Any, **__: Any) -> Any:
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()
        return Memory(0, 5, 5, 0)

    monkeypatch.setattr(passes, "memory_of", touches)
    for name in ("recover", "unload_others", "stream_more"):
        monkeypatch.setattr(recovery, name, touches)
    budget = host.part("core.budget")
    rung = budget.Rung("headroom", "as asked", budget.EXACT, budget.Plan(), True, True, False)
    place = SimpleNamespace(
        patcher=SimpleNamespace(load_device=CUDA),
        failures=0,
        fail=lambda memory: True,
        rung=rung,
        need=lambda: 100,
        doubted=set(),
        holdings=(),
    )
    threads = [threading.Thread(target=run._step_down, args=(place, False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) >= 4 * 4 and record.repeated == 4


def test_pins_stay_active_and_prefetches_end_after_a_failure(host, monkeypatch) -> None:
    import comfy.model_management as management
    import comfy.model_prefetch as prefetch

    recovery = host.part("nodes.recovery")
    dynamic, idle = Dynamic(), Dynamic()
    dynamic.model.dynamic_pins = {CUDA: {"active": True}}
    idle.model.dynamic_pins = {CUDA: {"active": False}}
    pins = [patcher.model.dynamic_pins[CUDA] for patcher in (dynamic, idle)]
    entries = [(None, dynamic), (None, idle)]
    monkeypatch.setattr(recovery.loaded_models, "loaded", lambda: entries)
    reset = lambda: [pin.update(active=False) for pin in pins]  # noqa: E731
    monkeypatch.setattr(management, "reset_cast_buffers", reset)
    monkeypatch.setattr(
        prefetch, "PREFETCH_QUEUES", [[None, (0, (dynamic.model, [dynamic.model[1]]))]]
    )
    recovery.recover([], alone=True)
    assert pins == [{"active": True}, {"active": False}]
    assert prefetch.PREFETCH_QUEUES == [] and not hasattr(dynamic.model[1], "_prefetch")


def test_beside_the_model_other_models_leave_too(host, monkeypatch) -> None:
    import comfy.model_management as management
    import comfy.samplers
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    other = ModelPatcher(torch.nn.Linear(1000, 1000), cpu, cpu)
    management.load_models_gpu([other])
    model, faults, whole = transformer(host, small()), Faults({0}), comfy.samplers.cond_cat
    monkeypatch.setattr(
        comfy.samplers, "cond_cat", lambda *a, **k: (faults.call(), whole(*a, **k))[1]
    )
    host.run(within(small()))
    loaded = [patcher.model for _, patcher in host.part("nodes.loaded_models").loaded()]
    assert faults.raised == 1 and other.model not in loaded
    assert model in [own.diffusion_model for own in loaded]
