"""Out of memory injected wherever it can happen: the same picture, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.core.budget import POLICIES
from pack.demo.tiny_checkpoints import TEXT_HIDDEN
from pack.tests.examples import examples
from pack.tests.graphs import node, text_to_image
from pack.tests.host import RunError
from pack.tests.nodes.faults import Faults, blocks_fail, fitted, latent, small, transformer, within

SAMPLERS = ["euler", "dpmpp_2m", "uni_pc", "dpmpp_sde"]
CALLS = 2 * 2 * 2  # blocks, sides of CFG, steps
ROUNDING = 1e-2


@pytest.fixture(scope="module")
def stock(host) -> dict[str, torch.Tensor]:
    """What ComfyUI's own sampler makes, by its algorithm; and of a larger picture."""
    host.forget_everything()
    larger_ones = {name + " larger": latent(host.run(larger(name))) for name in SAMPLERS}
    return {name: latent(host.run(small(name))) for name in SAMPLERS} | larger_ones


def larger(name: str = "euler", **inputs: Any) -> dict[str, Any]:
    """Of 96 px: slices of a smaller one, most of which is text, would need hardly less."""
    graph = small(name, **inputs)
    graph["latent"]["inputs"].update(width=96, height=96)
    return graph


@pytest.fixture
def model(host, stock) -> torch.nn.Module:
    """The transformer that all runs of this module share, without what earlier runs cached."""
    host.restart()
    return transformer(host, small())


@pytest.mark.parametrize("at", [0, 3, 4, 7])  # the first and the last of each step
def test_a_failure_at_any_block_of_any_step_changes_nothing(host, model, stock, at: int) -> None:
    with blocks_fail(model, Faults({at})) as faults:
        run = host.run(within(small()))
    assert faults.raised == 1 and latent(run).equal(stock["euler"])
    status = run.status("sampler")
    assert status["forward_passes_repeated"] == 1 and status["exactness"] == "exact"
    step = 1 + at // 4
    assert status["repeated_at_steps"] == [step] and status["done"] == "as asked"
    assert f"forward passes repeated: 1 (step {step} of 2)" in status["text"]
    assert [ref for ref in faults.tensors if ref() is not None] == []


@pytest.mark.parametrize("row", range(1, 6))
def test_failures_in_a_row_are_stepped_past(host, model, stock, row: int) -> None:
    with blocks_fail(model, Faults(range(row))) as faults:
        run = host.run(within(larger()))
    status = run.status("sampler")
    assert faults.raised == status["forward_passes_repeated"] == row
    assert_like(latent(run), stock["euler larger"], status["exactness"])
    assert status["exactness"] == ("exact" if row < 2 else "exact up to rounding")
    assert (status["done"] == "as asked") == (row == 1)


def assert_like(made: torch.Tensor, stock: torch.Tensor, exactness: str) -> None:
    """Bit for bit, or up to what kernels round otherwise."""
    if exactness == "exact":
        assert made.equal(stock)
    else:
        assert exactness == "exact up to rounding"
        assert torch.allclose(made, stock, atol=ROUNDING), (made - stock).abs().max()


@settings(
    max_examples=examples(8),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(SAMPLERS), at=st.sets(st.integers(0, 14), max_size=4))
def test_any_failures_leave_the_picture_as_it_is(host, model, stock, name: str, at: set) -> None:
    with blocks_fail(model, Faults(at)) as faults:
        run = host.run(within(larger(name)))
    status = run.status("sampler")
    assert status["forward_passes_repeated"] == faults.raised
    assert_like(latent(run), stock[name + " larger"], status["exactness"])
    assert not any(ref() is not None for ref in faults.tensors)


def test_the_last_rung_fails_with_what_was_tried(host, model, stock) -> None:
    def loaded() -> list[Any]:
        return [patcher.model for _, patcher in host.part("nodes.loaded_models").loaded()]

    host.run(within(small()))
    before = loaded()
    with blocks_fail(model, Faults(range(100))) as faults, pytest.raises(RunError) as caught:
        host.run(within(larger()))
    text = str(caught.value)
    assert "as asked: needs about" in text and "in 4 slices" in text and "px" in text
    assert "ran out of memory on your GPU" not in text and "out of memory" not in text
    assert caught.value.details["exception_type"].endswith("DoesNotFit")
    assert loaded() == before != []
    caught = None
    host.executor.status_messages.clear()
    gc.collect()
    assert faults.raised < 10 and not any(ref() is not None for ref in faults.tensors)
    assert latent(host.run(within(small()))).equal(stock["euler"])  # the queue goes on


class TooLarge(Faults):
    """Fails as long as a pass has more tokens of the picture than these."""

    def __init__(self, tokens: int, act: Any = None) -> None:
        super().__init__(range(1000), act)
        self.tokens = tokens

    def hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """As a forward hook of a block."""
        if kwargs["hidden_states"].shape[1] > self.tokens:
            self.call()


def test_approximations_come_last_and_only_if_they_are_allowed(host, model, stock) -> None:
    graph = text_to_image(size=192, steps=1)
    usual = latent(host.run(graph))
    with blocks_fail(model, TooLarge(143)):
        run = host.run(within(graph, policy="allow approximations"))
    assert run.status("sampler")["exactness"] == "approximate"
    text = run.status("sampler")["text"]
    assert "overlapping tiles" in text and "other patches" not in text  # which hold nothing
    assert latent(run).shape == usual.shape and not latent(run).equal(usual)


def test_tiles_are_not_tried_where_a_patch_looks_at_the_whole_picture(host, model, stock) -> None:
    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    options = patcher.model_options["transformer_options"]
    options["patches"] = {"of_another_node": [lambda *_: None]}
    try:
        with blocks_fail(model, TooLarge(0)), pytest.raises(RunError) as caught:
            host.run(within(text_to_image(size=192, steps=1), policy="allow approximations"))
        with blocks_fail(model, Faults(range(4))):
            run = host.run(within(larger(), policy="allow approximations"))
    finally:
        del options["patches"]
    assert "tiles" not in str(caught.value) and "Tried" in str(caught.value)
    assert "tiles" not in run.status("sampler")["done"]


# ------------------------------------------------------------------ beside the model itself
@pytest.mark.parametrize("at", [{0}, {2}, {0, 1, 2}])
def test_a_step_s_calculation_is_repeated(host, model, stock, monkeypatch, at: set) -> None:
    import comfy.samplers

    whole, faults = comfy.samplers.cond_cat, Faults(at)

    def failing(conds: list, **more: Any) -> Any:
        faults.call()
        return whole(conds, **more)

    monkeypatch.setattr(comfy.samplers, "cond_cat", failing)
    run = host.run(within(small()))
    status = run.status("sampler")
    assert latent(run).equal(stock["euler"]) and status["forward_passes_repeated"] == 0
    assert status["calculations_repeated"] == faults.raised == len(at)


def controlnet(host: Any, blocks: int) -> Any:
    """ComfyUI's own ControlNet for Qwen-Image, tiny and of random weights."""
    import comfy.ops
    from comfy.controlnet import ControlNet
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    net = QwenImageControlNetModel(
        num_layers=blocks,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=(4, 14, 14),
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.manual_cast,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    made = ControlNet(
        net.requires_grad_(False),
        compression_ratio=1,
        load_device=torch.device("cpu"),
        extra_conds=[],
        preprocess_image=lambda hint: hint.unsqueeze(2),  # with a VAE it would have frames
    )
    return made.set_cond_hint(torch.rand(1, 16, 4, 4, generator=generator), strength=0.7)


@pytest.mark.parametrize("at", [{0}, {1, 2}, {5}])
def test_a_controlnet_that_fails_is_asked_again(host, model, stock, at: set) -> None:
    """Its blocks fail, in some steps the model's too."""
    import nodes as comfy_nodes

    outputs = host.run(small()).outputs
    net = controlnet(host, blocks=2)

    def sample(patcher: Any) -> torch.Tensor:
        conds = [
            [[text, {**rest, "control": net.copy().set_cond_hint(net.cond_hint_original, 0.7)}]]
            for text, rest in (host_conds["positive"][0], host_conds["negative"][0])
        ]
        empty = {"samples": torch.zeros(1, 16, 1, 4, 4)}
        settings = (5, 2, 2.5, "euler", "simple", *conds, empty)
        return comfy_nodes.common_ksampler(patcher, *settings)[0]["samples"]

    host_conds = {name: outputs[name][0][0] for name in ("positive", "negative")}
    patcher = outputs["shift"][0][0]
    usual = sample(patcher)
    fitting = host.part("nodes.fitting").Fitting("exact only")
    with blocks_fail(net.control_model, Faults(at)) as faults, blocks_fail(model, Faults({3})):
        made = sample(fitting.patch(patcher))
    assert made.equal(usual) and not made.equal(stock["euler"])
    assert fitting.record.calculated_again == faults.raised == len(at)
    assert fitting.record.repeated == 1
    assert [ref for ref in faults.tensors if ref() is not None] == []


@pytest.mark.parametrize(
    ("name", "at"),
    [("euler", {0}), ("dpmpp_2m", {1}), ("uni_pc", {0, 2}), ("dpmpp_sde", {1}), ("euler", {0, 2})],
)
def test_between_two_passes_the_run_starts_again(
    host, model, stock, monkeypatch, name: str, at: set
) -> None:
    import comfy.samplers

    whole, faults = comfy.samplers.cfg_function, Faults(at)

    def failing(*arguments: Any, **more: Any) -> Any:
        faults.call(arguments[1])
        return whole(*arguments, **more)

    monkeypatch.setattr(comfy.samplers, "cfg_function", failing)
    run = host.run(within(small(name)))
    assert latent(run).equal(stock[name])
    assert run.status("sampler")["restarts"] == faults.raised == len(at)
    assert "started again from the first step" in run.status("sampler")["text"]
    assert not any(ref() is not None for ref in faults.tensors)


def test_a_restart_begins_with_the_same_conditioning_and_random_numbers(
    host, model, stock, monkeypatch
) -> None:
    import comfy.samplers

    whole, process, faults = comfy.samplers.cfg_function, comfy.samplers.process_conds, Faults({1})
    numbers: list[float] = []
    encoded: list[bool] = []

    def failing(*arguments: Any, **more: Any) -> Any:
        numbers.append(torch.rand(1).item())
        faults.call()
        return whole(*arguments, **more)

    def processing(inner: Any, noise: Any, conds: dict[str, Any], *rest: Any, **more: Any) -> Any:
        encoded.append(any(cond["model_conds"] for every in conds.values() for cond in every))
        return process(inner, noise, conds, *rest, **more)

    monkeypatch.setattr(comfy.samplers, "cfg_function", failing)
    monkeypatch.setattr(comfy.samplers, "process_conds", processing)
    assert latent(host.run(within(small()))).equal(stock["euler"])
    assert numbers[:2] == numbers[2:] and encoded == [False, False]


def test_it_starts_again_twice_at_most(host, model, stock, monkeypatch) -> None:
    import comfy.samplers

    faults = Faults(range(100))
    monkeypatch.setattr(comfy.samplers, "cfg_function", lambda *a, **k: faults.call())
    told: list[str] = []
    monkeypatch.setattr(host.server, "send_progress_text", lambda text, *_: told.append(text))
    with pytest.raises(RunError) as caught:
        host.run(within(small(), vram_limit=2.0))
    text = str(caught.value)
    assert "outside of the model's forward passes, in 3 runs one after the other" in text
    assert "Tried" not in text and "px" not in text and "vram_limit holds this run" in text
    assert faults.raised == 3
    again = host.part("nodes.fitting").RESTARTING
    assert told.count(again) == 2 and told[-1] == again


def test_a_preview_that_fails_is_skipped(host, model, stock, monkeypatch) -> None:
    import comfy.utils
    import latent_preview

    faults, seen = Faults({0}), []

    class Previewer:
        def decode_latent_to_preview_image(self, kind: str, x0: torch.Tensor) -> None:
            faults.call(x0)

    def progress(value: int, total: int, preview: Any, node_id: str | None = None) -> None:
        seen.append((value, total))

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Previewer())
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", progress)
    run = host.run(within(small()))
    assert latent(run).equal(stock["euler"]) and faults.calls == 2
    assert run.status("sampler")["previews_skipped"] == 1
    assert seen == [(1, 2), (2, 2)]


def test_another_error_is_no_want_of_memory(host, model, monkeypatch) -> None:
    import comfy.samplers

    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("of another kind")

    for name in ("cond_cat", "cfg_function"):
        with monkeypatch.context() as patch, pytest.raises(RunError, match="of another kind"):
            patch.setattr(comfy.samplers, name, broken)
            host.run(within(small()))


# ------------------------------------------------------------------------- interrupts and waits
def interrupt() -> None:
    """As the button does."""
    import comfy.model_management as management

    management.interrupt_current_processing(True)


@pytest.mark.parametrize("at", [{0}, {5}])
def test_an_interrupt_ends_a_retry(host, model, stock, at: set) -> None:
    with blocks_fail(model, Faults(at, act=interrupt)) as faults, pytest.raises(RunError):
        host.run(within(small()))
    assert faults.raised == 1
    assert host.executor.status_messages[-1][0] == "execution_interrupted"
    assert latent(host.run(within(small()))).equal(stock["euler"])


@pytest.fixture
def thief(host, monkeypatch) -> Any:
    """Another program that has taken memory of a card once a pass has failed."""
    passes, recovery = host.part("nodes.passes"), host.part("nodes.recovery")

    class Thief:
        has_taken = False
        pauses: list[float] = []

        def memory_of(self, *_: Any) -> Any:
            free = 1_000_000_000 if self.has_taken else 9_000_000_000
            return passes.Memory(free, 0, 0, 0)

        def take(self) -> None:
            self.has_taken = True

        def sleep(self, seconds: float) -> None:
            self.pauses.append(seconds)

    thief = Thief()
    thief.pauses = []
    monkeypatch.setattr(passes, "memory_of", thief.memory_of)
    monkeypatch.setattr(recovery, "wait", thief.sleep)
    return thief


def test_it_waits_for_memory_that_another_program_took(host, model, stock, thief) -> None:
    with blocks_fail(model, Faults(range(10), act=thief.take)):
        run = host.run(within(larger()))
    assert thief.pauses == pytest.approx([0.2, 0.4, 0.8, 1.6])
    status = run.status("sampler")
    assert status["waited_seconds"] == 3.0 and "waited 3.0 s for memory" in status["text"]
    assert_like(latent(run), stock["euler larger"], status["exactness"])


def test_it_waits_before_it_approximates_and_not_for_ever(host, model, stock, thief) -> None:
    with blocks_fail(model, Faults(range(100), act=thief.take)), pytest.raises(RunError):
        host.run(within(small(), policy="allow approximations"))
    assert sum(thief.pauses) == pytest.approx(20.0)
    thief.pauses.clear()
    thief.has_taken = False
    with blocks_fail(model, TooLarge(143, act=thief.take)):
        graph = text_to_image(size=192, steps=1)
        run = host.run(within(graph, policy="allow approximations"))
    assert sum(thief.pauses) == pytest.approx(20.0)
    assert run.status("sampler")["exactness"] == "approximate"


def test_it_repeats_a_pass_where_memory_is_back_before_one_looks(
    host, model, stock, monkeypatch
) -> None:
    """Seen on a card: nothing lacks any more, and yet pass after pass has run out."""
    pauses: list[float] = []
    monkeypatch.setattr(host.part("nodes.recovery"), "wait", pauses.append)
    monkeypatch.setattr(host.part("nodes.place"), "TELLING", ("cpu",))
    with blocks_fail(model, Faults(range(9))):
        run = host.run(within(larger()))
    assert pauses and sum(pauses) <= 6.0
    assert_like(latent(run), stock["euler larger"], run.status("sampler")["exactness"])
    pauses.clear()
    with blocks_fail(model, Faults(range(100))), pytest.raises(RunError):
        host.run(within(small(seed=3)))
    assert sum(pauses) == pytest.approx(6.0)


def test_an_interrupt_ends_a_wait(host) -> None:
    recovery = host.part("nodes.recovery")
    import comfy.model_management as management

    interrupt()
    with pytest.raises(management.InterruptProcessingException):
        recovery.wait(60)
    moments = iter([0.0, 0.0, 0.05, 0.2])
    recovery.wait(0.1, clock=lambda: next(moments))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_load_that_fails_makes_room_and_is_not_tried_for_ever(
    host, model, monkeypatch, policy: str
) -> None:
    """Policy 3 does not make a picture smaller that no load was ever followed by."""
    import comfy.sampler_helpers

    faults, unloaded = Faults(range(100)), []
    monkeypatch.setattr(comfy.sampler_helpers, "_prepare_sampling", lambda *a, **k: faults.call())
    recovery = host.part("nodes.recovery")
    monkeypatch.setattr(recovery, "unload_others", lambda *arguments: unloaded.append(arguments))
    with pytest.raises(RunError, match="not enough memory even to load the model"):
        host.run(within(larger(), policy=policy))
    assert faults.raised == 3 and unloaded == [(torch.device("cpu"), [])] * 2


@pytest.mark.parametrize(("act", "ended"), [(None, "failed"), ("interrupt", "cancelled")])
def test_a_run_without_a_picture_is_not_told_as_one_that_succeeded(
    host, model, monkeypatch, act: str | None, ended: str
) -> None:
    told: list[tuple[str, str]] = []
    tell = lambda text, node_id, sid: told.append((node_id, text))  # noqa: E731
    monkeypatch.setattr(host.server, "send_progress_text", tell)
    written: list[Any] = []
    metadata = host.part("nodes.outcome").Metadata
    monkeypatch.setattr(metadata, "write", lambda self, *facts: written.append(facts))
    faults = Faults(range(100), act=interrupt if act else None)
    with blocks_fail(model, faults), pytest.raises(RunError):
        host.run(fitted(small(seed=77)))
    assert [node for node, _ in told[-2:]] == ["sampler", "fit"] and written == []
    assert told[-1][1].startswith(f"{ended} · forward passes repeated: ")
    assert "exact" not in told[-1][1]
    host.run(fitted(small(seed=78)))
    assert told[-1][1].startswith("as asked (exact)") and len(written) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 9 bytes.",
        "MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9)",
        "Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!",
        "XPU out of memory. Tried to allocate 9 GiB",
    ],
)
def test_other_devices_say_it_by_their_own_words(host, model, stock, text: str) -> None:
    class Other(Faults):
        def call(self, *tensors: torch.Tensor) -> None:
            try:
                super().call(*tensors)
            except torch.OutOfMemoryError:
                raise RuntimeError(text) from None

    with blocks_fail(model, Other({1})) as faults:
        run = host.run(within(small()))
    assert faults.raised == 1 and latent(run).equal(stock["euler"])
    assert not host.part("nodes.recovery").is_oom(ValueError(text))


def test_the_cpu_s_own_want_of_memory_is_known(host) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert host.part("nodes.recovery").is_oom(caught.value)


def test_a_model_with_blocks_of_another_node_tries_no_slices(host, model, stock) -> None:
    class Foreign(type(model.transformer_blocks[1].img_mlp)):
        pass

    block = model.transformer_blocks[1]
    whole = block.img_mlp
    block.img_mlp = foreign = host.part("nodes.slicing")._copy(whole, Foreign)
    try:
        with blocks_fail(model, Faults({0, 1, 2})):
            run = host.run(within(larger()))
        assert type(foreign) is Foreign
    finally:
        block.img_mlp = whole
    status = run.status("sampler")
    assert "Another node replaced the feed-forward" in status["text"]
    assert "slices" not in status["done"] and latent(run).equal(stock["euler larger"])


# -------------------------------------------------------------------------------- what is left
def test_neither_clone_nor_model_outlives_its_use(host, stock) -> None:
    """Without the garbage collector: a reference cycle would keep the weights in memory."""
    host.restart()
    model = transformer(host, small())
    with blocks_fail(model, Faults({1, 3, 4})):
        host.run(fitted(small()))
    clone = weakref.ref(host.executor.caches.outputs.get_local("fit").outputs[0][0])
    weights = weakref.ref(model)
    del model
    assert clone() is not None
    gc.collect()
    gc.disable()
    try:
        host.executor.caches.outputs.cache.clear()
        assert clone() is None
        host.part("nodes.loaders").REGISTRY.release()
        assert weights() is None
    finally:
        gc.enable()
        host.restart()


def test_nothing_of_a_run_stays_with_the_model(host, model, stock) -> None:
    from comfy.patcher_extension import WrappersMP

    Plan = host.part("core.budget").Plan
    with blocks_fail(model, Faults(range(4))):
        host.run(fitted(larger(seed=41)))
    patched = host.executor.caches.outputs.get_local("fit").outputs[0][0]
    (wrapper,) = patched.wrappers[WrappersMP.OUTER_SAMPLE]["qwen_vram.fit"]
    fitting = wrapper.__self__
    assert fitting.record.rung.plan != Plan()
    assert fitting.plans.of(patched.load_device) == Plan()
    assert fitting._passes is None


def test_what_records_commits_only_after_success(host, model, stock) -> None:
    """As the cache of the references will: through the list in the transformer's options."""
    import comfy.patcher_extension as extension

    committed: list[int] = []
    passes = 0

    def recording(executor: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal passes
        passes += 1
        arguments[5]["qwen_vram.on_success"].append(lambda number=passes: committed.append(number))
        return executor(*arguments, **more)

    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    kind = extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "test.recording", recording)
    try:
        with blocks_fail(model, Faults({0, 1, 3, 8})):
            run = host.run(within(small()))
    finally:
        patcher.remove_wrappers_with_key(kind, "test.recording")
    assert run.status("sampler")["forward_passes_repeated"] == 4
    assert passes == 8 and len(committed) == 4  # two sides of CFG, two steps
    assert committed == sorted(committed) and not {1, 2} & set(committed)


def test_what_records_commits_once_where_a_calculation_is_repeated(
    host, model, stock, monkeypatch
) -> None:
    """The first pass of it has succeeded, and runs again: memory runs out before the second."""
    import comfy.patcher_extension as extension
    import comfy.samplers

    committed: list[int] = []
    passes = 0
    whole, faults = comfy.samplers.cond_cat, Faults({1, 5})

    def recording(executor: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal passes
        passes += 1
        arguments[5]["qwen_vram.on_success"].append(lambda number=passes: committed.append(number))
        return executor(*arguments, **more)

    failing = lambda *a, **k: (faults.call(), whole(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(comfy.samplers, "cond_cat", failing)
    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    kind = extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "qwen_vram.recording", recording)
    try:
        run = host.run(within(small()))
    finally:
        patcher.remove_wrappers_with_key(kind, "qwen_vram.recording")
        transformer(host, small())  # the clones are forgotten
    assert run.status("sampler")["calculations_repeated"] == faults.raised == 2
    assert passes == 6 and committed == [2, 3, 5, 6]
    assert latent(run).equal(stock["euler"])


def test_wrappers_that_lie_beside_the_model_are_repeated_too(host, model, stock) -> None:
    """Other nodes put them into the options, where they would come before the model's own."""
    import comfy.patcher_extension as extension

    faults = Faults({1})

    def failing(executor: Any, *arguments: Any, **more: Any) -> Any:
        faults.call()
        return executor(*arguments, **more)

    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    options = patcher.model_options["transformer_options"]
    kind = extension.WrappersMP.APPLY_MODEL
    extension.add_wrapper_with_key(kind, "qwen_vram.test", failing, options)
    try:
        run = host.run(within(small()))
    finally:
        del options["wrappers"]
        transformer(host, small())  # the clones are forgotten
    said = run.status("sampler")
    assert said["forward_passes_repeated"] == faults.raised == 1
    assert said["calculations_repeated"] == 0 and latent(run).equal(stock["euler"])


def test_controlnets_let_go_of_a_run_that_starts_again(host, model, stock, monkeypatch) -> None:
    import comfy.samplers
    import nodes as comfy_nodes
    from comfy.controlnet import ControlBase

    events: list[str] = []

    class Control(ControlBase):
        def pre_run(self, *rest: Any) -> None:
            events.append("begin")

        def get_control(self, *rest: Any) -> dict[str, Any]:
            return {"input": []}

        def cleanup(self) -> None:
            events.append("end")

    outputs, whole, faults = host.run(small()).outputs, comfy.samplers.cfg_function, Faults({1})
    failing = lambda *a, **k: (faults.call(), whole(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(comfy.samplers, "cfg_function", failing)
    text, rest = outputs["positive"][0][0][0]
    conds = [[[text, {**rest, "control": Control()}]], outputs["negative"][0][0]]
    settings = (5, 2, 2.5, "euler", "simple", *conds, {"samples": torch.zeros(1, 16, 1, 4, 4)})
    fitting = host.part("nodes.fitting").Fitting("exact only")
    comfy_nodes.common_ksampler(fitting.patch(outputs["shift"][0][0]), *settings)
    assert fitting.record.restarts == faults.raised == 1
    assert events == ["begin", "end", "begin", "end"]


@pytest.mark.parametrize("at", [{0}, {3}, {5, 6}])
def test_comfyui_s_custom_sampler_runs_with_the_patch(host, model, at: set) -> None:
    graph = custom()
    usual = host.run(graph).outputs["sampler"][0][0]["samples"]
    patched = {**fitted(graph), "sampler": graph["sampler"]}
    patched["guider"] = {**graph["guider"], "inputs": {**graph["guider"]["inputs"]}}
    patched["guider"]["inputs"]["model"] = ["fit", 0]
    with blocks_fail(model, Faults(at)) as faults:
        run = host.run(patched)
    assert faults.raised == len(at)
    assert torch.allclose(run.outputs["sampler"][0][0]["samples"], usual, atol=ROUNDING)


def custom() -> dict[str, Any]:
    """The same picture by SamplerCustomAdvanced and its parts."""
    graph = small()
    conds = {"positive": ["positive", 0], "negative": ["negative", 0]}
    graph["guider"] = node("CFGGuider", model=["shift", 0], cfg=2.5, **conds)
    graph["noise"] = node("RandomNoise", noise_seed=3)
    graph["algorithm"] = node("KSamplerSelect", sampler_name="euler")
    given = {"scheduler": "simple", "steps": 3, "denoise": 1.0}
    graph["sigmas"] = node("BasicScheduler", model=["shift", 0], **given)
    graph["sampler"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["algorithm", 0],
        sigmas=["sigmas", 0],
        latent_image=["latent", 0],
    )
    return graph


def test_what_other_patches_hold_is_let_go_of_on_the_rung_for_it(host, model, stock) -> None:
    class Holding:
        released = 0

        def bytes_held(self) -> int:
            return 1000

        def release(self) -> None:
            self.released += 1

    holding = Holding()
    patcher = host.executor.caches.outputs.get_local("unet").outputs[0][0]
    options = patcher.model_options["transformer_options"]
    options["qwen_vram.holdings"] = [holding]
    try:
        host.run(within(small()))
        assert holding.released == 0
        with blocks_fail(model, Faults(range(4))):
            run = host.run(within(small()))
    finally:
        del options["qwen_vram.holdings"]
    assert holding.released >= 1 and "other patches" in run.status("sampler")["text"]
