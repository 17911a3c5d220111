"""A model that computes attention by a chosen backend: exact, checked, and never a black picture."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import LORA, UNET, node
from pack.tests.host import Host, RunError
from pack.tests.nodes.faults import latent, small
from pack.tests.nodes.slicing_models import conditioning, random, sample
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HIDDEN = torch.tensor([[1] * 9 + [0] * 4])  # of the encoder: four tokens of padding
ON_A_CPU = ("ComfyUI's own", "PyTorch SDPA", "SDPA flash", "sub-quadratic", "split")
IN_AUTO = ["ComfyUI's own", "SDPA flash"]  # where the first is PyTorch SDPA: nothing slower
CUDA = torch.device("cuda")
CASES = 5  # of a self-test
CALLS = 2 * 2  # of attention in a run: two steps, two blocks, both sides of CFG together
Attend = Callable[..., Tensor]


@pytest.fixture(scope="module")
def attention(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.attention")


@pytest.fixture(scope="module")
def parts(host: Host, attention: ModuleType) -> SimpleNamespace:
    """The modules beside it."""
    names = ("attention_backends", "attention_health", "attention_override", "fitting")
    return SimpleNamespace(**{name: host.part(f"nodes.{name}") for name in names})


@pytest.fixture(scope="module")
def model(host: Host) -> Iterator[Any]:
    """A model that no test changes; afterwards the host has forgotten it."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_remembered(parts: SimpleNamespace) -> None:
    """Of self-tests and times."""
    parts.attention_health.forget()


@pytest.fixture
def backend(parts: SimpleNamespace, monkeypatch) -> Callable[..., str]:
    """Puts one more backend into the table, and gives its name."""

    def put(attend: Attend, name: str = "made up", **more: Any) -> str:
        module = parts.attention_backends
        every = {"dtypes": module.EVERY, **more}
        made = module.Backend(name, attend, lambda device: "", **every)
        monkeypatch.setitem(module.BACKENDS, name, made)
        return name

    return put


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As PyTorch SDPA."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def no_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Has no way to hide a key."""
    assert mask is None
    return sdpa(q, k, v, None, scale)


class Counted:
    """A backend that counts its calls at work: those of the sizes of a self-test are not."""

    def __init__(
        self, act: Callable[[int], None] = lambda call: None, attend: Attend = sdpa
    ) -> None:
        self.act, self.attend, self.calls, self.tests = act, attend, 0, 0

    def __call__(self, q: Tensor, *rest: Any) -> Tensor:
        if q.shape[1:3] == (3, 200):
            self.tests += 1
            return self.attend(q, *rest)
        self.calls += 1
        self.act(self.calls)
        return self.attend(q, *rest)


def patched(attention: ModuleType, model: Any, wanted: str) -> tuple[Any, Any]:
    """A clone, and what keeps the record of its runs."""
    made = attention.Attention(wanted)
    return made.patch(model), made


def close(found: Tensor, stock: Tensor) -> None:
    """Equal up to the rounding of another kernel over a few steps."""
    torch.testing.assert_close(found, stock, rtol=2e-3, atol=2e-3)


def masked(seed: int = 7) -> list[Any]:
    """A prompt with padding."""
    return conditioning(seed=seed, attention_mask=HIDDEN)


# ------------------------------------------------------------------------------ the same picture
@pytest.mark.parametrize("wanted", ["PyTorch SDPA", "ComfyUI's own"])
@pytest.mark.parametrize("prompt", [conditioning, masked], ids=["whole", "masked"])
def test_sdpa_is_bit_identical_to_stock(attention, model, wanted, prompt) -> None:
    clone, made = patched(attention, model, wanted)
    assert sample(clone, prompt(), batch=2).equal(sample(model, prompt(), batch=2))
    assert made.record.exactness() == "exact" and list(made.record.used) == [wanted]


@pytest.mark.parametrize("wanted", [*ON_A_CPU[2:], "auto", "auto, also quantised"])
@pytest.mark.parametrize("prompt", [conditioning, masked], ids=["whole", "masked"])
def test_another_kernel_gives_the_picture_up_to_rounding(attention, model, wanted, prompt) -> None:
    clone, made = patched(attention, model, wanted)
    close(sample(clone, prompt()), sample(model, prompt()))
    run = made.record
    assert run.calls >= CALLS and not run.notes
    if wanted in ON_A_CPU:
        assert list(run.used) == [wanted] and run.exactness() == "exact up to rounding"
        assert run.line().startswith(f"{wanted}: {wanted} (exact up to rounding) · error in the")


def test_padding_makes_a_difference_that_is_not_lost(attention, model, backend) -> None:
    """Otherwise the tests above would hold for a backend that ignores masks."""
    whole, hidden = conditioning(seed=7), masked()
    assert (sample(model, hidden) - sample(model, whole)).abs().max() > 0.01
    clone, made = patched(attention, model, backend(no_mask))
    close(sample(clone, hidden), sample(model, hidden))
    assert list(made.record.used) == ["made up"]


def test_each_picture_of_a_batch_has_its_own_padding(attention, model, backend) -> None:
    """Two prompts of one length in one pass."""
    other = torch.tensor([[1] * 5 + [0] * 8])
    positive, negative = masked(), conditioning(seed=8, attention_mask=other)
    shapes = []

    def seen(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        shapes.append(k.shape)
        return no_mask(q, k, *rest)

    clone, _ = patched(attention, model, backend(seen))
    close(sample(clone, positive, negative), sample(model, positive, negative))
    picture = 20 * 18
    assert {s[2] - picture for s in shapes if s[2] > picture} >= {9, 5}


def test_a_mask_that_adds_to_the_scores_goes_to_sdpa(attention, model, backend) -> None:
    soft = conditioning(seed=7, attention_mask=torch.rand(1, 13, generator=_seed()))
    clone, made = patched(attention, model, backend(no_mask))
    found = sample(clone, soft)
    close(found, sample(model, soft))
    assert set(made.record.used) == {"made up", "PyTorch SDPA"}  # the negative has no mask
    assert list(made.record.notes) == [
        "made up: it takes no mask that adds to the scores. PyTorch SDPA instead"
    ]


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_another_width_and_more_keys_than_queries(attention, parts) -> None:
    """As a reference cache in front of it makes them; and as models call it that keep the heads
    together, with fewer heads of keys, or with a scale."""
    from comfy.ldm.modules.attention import attention_pytorch

    options: dict[str, Any] = {}
    made = attention.Attention("split")
    parts.attention_override.put(options, parts.attention_override.BACKEND, made)
    q, k, v = random(2, 30, 6 * 40), random(2, 77, 2 * 40, seed=2), random(2, 77, 2 * 40, seed=3)
    for more in ({"enable_gqa": True}, {"enable_gqa": True, "scale": 0.3}):
        stock = attention_pytorch(q, k, v, 6, **more)
        close(attention_pytorch(q, k, v, 6, transformer_options=options, **more), stock)
    apart = [x.unflatten(-1, (-1, 40)).transpose(1, 2) for x in (q, k, v)]
    more = {"skip_reshape": True, "skip_output_reshape": True, "enable_gqa": True}
    stock = attention_pytorch(*apart, 6, **more)
    close(attention_pytorch(*apart, 6, transformer_options=options, **more), stock)
    assert made.record.calls == 3 and list(made.record.used) == ["split"]


def test_shapes_that_are_no_attention_of_equal_heads_are_comfyui_s(attention, parts) -> None:
    from comfy.ldm.modules.attention import attention_pytorch

    options: dict[str, Any] = {}
    made = attention.Attention("split")
    parts.attention_override.put(options, parts.attention_override.BACKEND, made)
    q, v = random(1, 4, 30, 16), random(1, 4, 30, 8)
    apart = {"skip_reshape": True, "skip_output_reshape": True}
    stock = attention_pytorch(q, q, v, 4, **apart)
    assert attention_pytorch(q, q, v, 4, transformer_options=options, **apart).equal(stock)
    assert list(made.record.used) == ["ComfyUI's own"] and len(made.record.notes) == 1


def test_slices_and_a_cache_in_front(attention, parts, model, host, backend) -> None:
    """The chain's order: the cache adds keys, slices come one by one, the backend computes."""
    slicing = host.part("nodes.slicing")
    counted = Counted()

    def cache(function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        return function(
            q, torch.cat([k, k[:, :, :50]], 2), torch.cat([v, v[:, :, :50]], 2), *rest, **more
        )

    cache.sliceable = True

    def cached(clone: Any) -> Any:
        slot = clone.model_options["transformer_options"]
        parts.attention_override.put(slot, parts.attention_override.REFERENCE_CACHE, cache)
        return clone

    def in_slices(clone: Any) -> Any:
        plans = slicing.Plans()
        plans.set(torch.device("cpu"), slicing.Plan(attention=3))
        assert slicing.install(clone, plans) == ""
        return clone

    wanted = sample(cached(model.clone()))
    clone, made = patched(attention, model, backend(counted))
    close(sample(in_slices(cached(clone))), wanted)
    assert counted.calls == made.record.calls > CALLS
    again, _ = patched(attention, in_slices(cached(model.clone())), "made up")
    close(sample(again), wanted)


# ------------------------------------------------------------------------------ broken backends
def broken_nan(*given: Any) -> Tensor:
    return sdpa(*given) * float("nan")


def broken_scale(*given: Any) -> Tensor:
    return sdpa(*given[:4], 1.0)


def broken_layout(*given: Any) -> Tensor:
    return sdpa(*(x.transpose(1, 2).reshape(x.shape) for x in given[:3]), *given[3:])


def raises(*given: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this card")


def deaf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return sdpa(q, k, v, None, scale)


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (broken_nan, "gives NaN (one key in the last block)"),
        (broken_scale, "wrong numbers: error"),
        (broken_layout, "wrong numbers: error"),
        (raises, "RuntimeError: no kernel image is available"),
    ],
    ids=["NaN", "scale", "layout", "raises"],
)
def test_a_broken_backend_never_computes(attention, model, backend, attend, why) -> None:
    counted = Counted(attend=attend)
    clone, made = patched(attention, model, backend(counted))
    assert sample(clone).equal(sample(model))
    assert counted.calls == 0 and counted.tests > 0
    (note,) = made.record.notes
    assert note.startswith(f"made up: failed its self-test ({why}")
    assert note.endswith("PyTorch SDPA instead")
    assert list(made.record.used) == ["PyTorch SDPA"] and note in made.record.line()


def test_one_that_ignores_masks_serves_calls_without(attention, model, parts, backend) -> None:
    """The self-test looks at masks that add; hidden keys it never gets."""
    module = parts.attention_health
    name = backend(deaf, takes_masks=True)
    device, dtype = torch.device("cpu"), torch.float32
    situation = module.Situation(device, dtype, 32, "no mask")
    made = parts.attention_backends.BACKENDS[name]
    assert module.verdict(made, situation).healthy
    assert module.verdict(made, replace(situation, mask="hidden keys")).healthy
    found = module.verdict(made, replace(situation, mask="bias"))
    assert not found.healthy and found.reason.startswith("ignores the mask")


def test_the_self_test_runs_once_per_situation(attention, model, backend) -> None:
    counted = Counted()
    clone, _ = patched(attention, model, backend(counted))
    sample(clone)
    tests = counted.tests
    sample(clone, batch=2)
    assert counted.tests == tests == CASES
    sample(clone, masked())
    assert counted.tests == tests + 2 * CASES  # hidden keys, others for each of the two items


def test_a_backend_that_raises_at_work_is_replaced_call_by_call(attention, model, backend) -> None:
    def act(call: int) -> None:
        if call == 2:
            raise RuntimeError("too many tokens")

    counted = Counted(act)
    clone, made = patched(attention, model, backend(counted))
    close(sample(clone), sample(model))
    assert counted.calls == made.record.calls == CALLS
    assert list(made.record.notes) == [
        "made up: RuntimeError: too many tokens. PyTorch SDPA instead"
    ]


def test_one_that_always_raises_is_not_asked_for_ever(attention, model, backend) -> None:
    def act(call: int) -> None:
        raise RuntimeError("too many tokens")

    counted = Counted(act)
    clone, made = patched(attention, model, backend(counted))
    assert sample(clone).equal(sample(model))
    assert counted.calls == 3 and made.record.calls == CALLS
    assert any("too many tokens" in note for note in made.record.notes)


def test_nan_at_work_is_computed_again_and_not_trusted_again(attention, model, backend) -> None:
    """It passed its self-test, and the picture would be black."""
    counted = Counted(attend=lambda *g: sdpa(*g) * (1 if g[0].shape[2] == 200 else float("nan")))
    clone, made = patched(attention, model, backend(counted))
    assert sample(clone).equal(sample(model))
    assert counted.calls == 2  # one pass of two blocks
    (note,) = made.record.notes
    assert note == (
        "made up: gave numbers that are not finite in a forward pass, which was repeated. "
        "PyTorch SDPA instead"
    )
    assert sample(clone).equal(sample(model)) and counted.calls == 2
    assert "not finite in a forward pass" in made.record.line()


def test_nan_of_the_model_itself_is_no_fault_of_the_backend(attention, model, backend) -> None:
    counted = Counted()
    clone, made = patched(attention, model, backend(counted))
    clone.add_wrapper_with_key(
        "diffusion_model", "nan", lambda run, *a, **k: run(*a, **k) * float("nan")
    )
    assert sample(clone).isnan().all()
    (note,) = made.record.notes
    assert note.endswith("with PyTorch SDPA neither: not because of made up")
    assert list(made.record.used) == ["made up", "PyTorch SDPA"]
    assert counted.calls == CALLS and made.record.calls == CALLS + 2  # one pass twice


def test_once_stopped_no_pass_is_repeated(attention, model, backend) -> None:
    """What is not finite then is the model's."""
    passes: list[int] = []

    def last(run: Any, *args: Any, **more: Any) -> Tensor:
        passes.append(1)
        return run(*args, **more) * (1 if len(passes) < 3 else float("nan"))

    clone, made = patched(
        attention,
        model,
        backend(lambda *g: sdpa(*g) * (1 if g[0].shape[2] == 200 else float("nan"))),
    )
    clone.add_wrapper_with_key("diffusion_model", "last", last)
    assert sample(clone).isnan().all()
    assert len(passes) == 3 and len(made.record.notes) == 1  # the first step's twice


def test_what_records_during_a_pass_commits_the_repeated_one(
    attention, model, parts, backend
) -> None:
    """Other patches' notes of the pass that failed are dropped; without Fit as with it."""
    done: list[int] = []

    def records(executor: Any, *args: Any, **more: Any) -> Tensor:
        options = args[6]  # ComfyUI passes transformer_options by their place
        out = executor(*args, **more)
        finite = bool(out.isfinite().all())
        waiting = options.get("qwen_vram.on_success")
        if waiting is None:  # nobody will repeat this pass
            done.append(finite)
        else:
            waiting.append(lambda: done.append(finite))
        return out

    wrong = backend(lambda *g: sdpa(*g) * (1 if g[0].shape[2] == 200 else float("nan")))
    for fit in (False, True):
        done.clear()
        attention.health.forget()
        clone, _ = patched(attention, model, wrong)
        clone.add_wrapper_with_key("diffusion_model", "records", records)
        if fit:
            clone = parts.fitting.Fitting("exact only").patch(clone)
        sample(clone)
        assert done == [True] * 2, fit  # of each step's pass


def test_out_of_memory_passes_through(attention, model, parts, backend) -> None:
    """It is for Fit to VRAM, or for ComfyUI; in the self-test, too, which then is repeated."""

    def once(call: int) -> None:
        if call == 3:
            raise torch.OutOfMemoryError("injected by a test")

    counted = Counted(once)
    clone, made = patched(attention, model, backend(counted))
    with pytest.raises(torch.OutOfMemoryError):
        sample(clone)
    assert not any("injected" in note for note in made.record.notes)
    counted = Counted(once)
    fitting = parts.fitting.Fitting("exact only")
    clone = fitting.patch(patched(attention, model, backend(counted))[0])
    close(sample(clone), sample(model))
    assert fitting.record.repeated == 1 and counted.calls > CALLS


def test_out_of_memory_in_the_self_test_is_no_verdict(parts, backend) -> None:
    calls = []

    def act(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected by a test")
        return sdpa(*given)

    module = parts.attention_health
    situation = module.Situation(torch.device("cpu"), torch.float32, 32, "no mask")
    made = parts.attention_backends.BACKENDS[backend(act)]
    with pytest.raises(torch.OutOfMemoryError):
        module.verdict(made, situation)
    assert module.verdict(made, situation).healthy


def test_an_interrupt_passes_through(attention, model, backend) -> None:
    from comfy.model_management import InterruptProcessingException

    def act(call: int) -> None:
        raise InterruptProcessingException()

    clone, made = patched(attention, model, backend(Counted(act)))
    with pytest.raises(InterruptProcessingException):
        sample(clone)
    assert not made.record.notes and made._run is None


def test_a_run_that_fails_leaves_a_line(attention, model, monkeypatch) -> None:
    """Also one that had no time to use anything."""
    from comfy.model_management import InterruptProcessingException

    told: list[str] = []
    monkeypatch.setattr(attention.outcome, "tell", lambda text, *ids: told.append(text))
    clone, _ = patched(attention, model, "split")
    for error in (torch.OutOfMemoryError("injected"), InterruptProcessingException()):
        fails(clone, error)
        with pytest.raises(type(error)):
            sample(clone)
    assert told == ["failed", "cancelled"]


def fails(clone: Any, error: Exception) -> None:
    """Its forward passes raise."""

    def wrapper(*_: Any, **__: Any) -> Any:
        raise error

    clone.remove_wrappers_with_key("diffusion_model", "fails")
    clone.add_wrapper_with_key("diffusion_model", "fails", wrapper)


def test_easycache_is_put_back_before_a_pass_is_repeated(attention, model, host, backend) -> None:
    """It counts the pass that failed, and writes over the input of one that it skips."""
    calls = []

    def fifth(*given: Any) -> Tensor:
        calls.extend([1] if given[0].shape[2] != 200 else [])
        return sdpa(*given) * (float("nan") if len(calls) == 5 else 1)

    wrong = backend(fifth)
    easy = host.nodes.NODE_CLASS_MAPPINGS["EasyCache"]
    pictures = []
    for wanted in ("PyTorch SDPA", wrong):
        clone, made = patched(attention, model, wanted)
        (cached,) = easy.execute(clone, 1.0, 0.15, 0.95, False).args
        pictures.append(sample(cached, steps=6))
    assert made.record.notes and pictures[0].equal(pictures[1])


def test_a_compiled_or_trained_model_is_left_alone(attention, model, backend, monkeypatch) -> None:
    import comfy.model_management

    counted = Counted()
    clone, made = patched(attention, model, backend(counted))
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "in_training", True)
        patch.setattr(attention.slicing, "compiled", lambda options: True)
        assert sample(clone).equal(sample(model))
    assert counted.calls == counted.tests == 0
    assert list(made.record.notes) == [attention.COMPILED]


def test_a_data_type_that_a_backend_does_not_take_is_told(attention, model, backend) -> None:
    counted = Counted()
    clone, made = patched(attention, model, backend(counted, dtypes=(torch.float16,)))
    assert sample(clone).equal(sample(model)) and counted.calls == counted.tests == 0
    assert list(made.record.notes) == [
        "made up: it does not work with float32. PyTorch SDPA instead"
    ]


# ------------------------------------------------------------------------------ ComfyUI's own
@pytest.fixture
def own_attention(monkeypatch) -> Callable[..., None]:
    """Makes another function ComfyUI's own, as its command line does."""
    import comfy.ldm.modules.attention as theirs
    import comfy.ldm.qwen_image.model as qwen

    def put(attend: Callable[[Tensor], Tensor], knows_masks: bool = True) -> None:
        @theirs.wrap_attn
        def own(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **more: Any) -> Any:
            more.pop("_inside_attn_wrapper", None)
            mask = mask if knows_masks else None
            return attend(theirs.attention_pytorch(q, k, v, heads, mask, **more))

        monkeypatch.setattr(theirs, "optimized_attention", own)
        monkeypatch.setattr(qwen, "optimized_attention_masked", own)

    return put


def test_auto_replaces_comfyui_s_own_where_that_is_broken(attention, model, own_attention) -> None:
    stock = sample(model)
    own_attention(lambda out: out * float("nan"))
    assert sample(model).isnan().all()  # the black picture
    clone, made = patched(attention, model, "auto")
    close(sample(clone), stock)
    assert "ComfyUI's own" not in made.record.used
    note = "ComfyUI's own: failed its self-test (gives NaN (one key in the last block)). Not used"
    assert list(made.record.notes) == [note]
    if list(made.record.used) == ["PyTorch SDPA"]:
        assert made.record.exactness() == "exact"
    clone, made = patched(attention, model, "ComfyUI's own")
    assert sample(clone).isnan().all()
    assert list(made.record.notes) == [note.replace("Not used", "Used all the same: it was chosen")]


def test_comfyui_s_own_is_tested_with_the_mask_as_it_gets_it(
    attention, model, own_attention
) -> None:
    """No key is left out for it: that would hide that it does not know masks."""
    stock = sample(model, masked())
    own_attention(lambda out: out, knows_masks=False)
    clone, made = patched(attention, model, "auto")
    close(sample(clone, masked()), stock)
    (note,) = made.record.notes
    assert note.startswith("ComfyUI's own: failed its self-test (ignores the mask")


def test_pytorch_is_exact_up_to_rounding_where_comfyui_takes_another(
    attention, model, own_attention
) -> None:
    own_attention(lambda out: out * (1 + 1e-6))
    for wanted, relation in (("PyTorch SDPA", "exact up to rounding"), ("ComfyUI's own", "exact")):
        clone, made = patched(attention, model, wanted)
        sample(clone)
        assert made.record.exactness() == relation and not made.record.notes


def test_comfyui_s_own_is_not_trusted_at_work_either(
    attention, model, parts, own_attention, monkeypatch
) -> None:
    """It passes the self-test, and is the fastest."""
    stock = sample(model)
    own_attention(lambda out: out if out.shape[2] == 200 else out * float("nan"))
    timed(parts, monkeypatch, {"ComfyUI's own": 0.1})
    clone, made = patched(attention, model, "auto")
    close(sample(clone), stock)
    (note,) = made.record.notes
    assert note.startswith("ComfyUI's own: gave numbers that are not finite in a forward pass")


def test_no_kernel_is_chosen_by_flags_while_several_gpus_compute(
    attention, parts, monkeypatch
) -> None:
    """The flags are the process's: the other thread's model would see them."""
    from comfy.ldm.modules.attention import attention_pytorch

    every = timed(parts, monkeypatch, {"SDPA flash": 0.1})
    q = random(1, 30, 64)
    for wanted in ("auto", "SDPA flash"):
        options = attention_options(attention, wanted)
        made = options.pop("made")
        options["multigpu_thread_device"] = CUDA
        attention_pytorch(q, q, q, 2, transformer_options=options)
        assert "SDPA flash" not in [*made.record.used, *every]
        (note,) = made.record.notes
        assert "while several GPUs compute" in note
        every.clear()
        del options["multigpu_thread_device"]
        attention_pytorch(q, q, q, 2, transformer_options=options)
        assert "SDPA flash" in made.record.used
        every.clear()


def attention_options(attention: ModuleType, wanted: str) -> dict[str, Any]:
    """transformer_options with a chain, and under "made" what is in it."""
    options: dict[str, Any] = {}
    made = attention.Attention(wanted)
    attention.attention_override.put(options, attention.attention_override.BACKEND, made)
    return {**options, "made": made}


# ------------------------------------------------------------------------------ auto
def test_auto_takes_the_fastest_that_is_clearly_faster(parts) -> None:
    fastest = parts.attention_health.fastest
    assert fastest({"own": 1.0, "a": 0.97, "b": 2.0}, "own") == "own"
    assert fastest({"own": 1.0, "a": 0.9, "b": 0.5}, "own") == "b"
    assert fastest({"a": 0.9}, "own") == "a"  # ComfyUI's own failed
    assert fastest({}, "own") == "own"


def timed(parts: SimpleNamespace, monkeypatch, seconds: dict[str, float]) -> list[str]:
    """Makes times known, and lists what was timed."""
    every: list[str] = []
    module = parts.attention_health
    whole = module._measure

    def measure(calls: dict[str, Any], device: torch.device) -> Any:
        every.extend(calls)
        assert whole(calls, device).seconds.keys() == calls.keys()  # they do run
        return module.Times({name: seconds.get(name, 1.0) for name in calls})

    monkeypatch.setattr(module, "_measure", measure)
    return every


def test_auto_times_what_is_healthy_once(attention, model, parts, monkeypatch, backend) -> None:
    backend(broken_nan, "broken")
    backend(sdpa, "quantised one", quantised=0.1)
    known = {"SDPA flash": 0.5, "quantised one": 0.1, "broken": 0.01}
    every = timed(parts, monkeypatch, known)
    clone, made = patched(attention, model, "auto")
    close(sample(clone), sample(model))
    assert every == IN_AUTO and list(made.record.used) == ["SDPA flash"]
    assert made.record.line().startswith(
        "auto: SDPA flash (exact up to rounding) · at 512 keys, batch 2: "
        "SDPA flash 500 ms, ComfyUI's own 1e+03 ms · error in the self-test: "
    )
    sample(clone)  # nothing more to time
    assert every == IN_AUTO
    clone, made = patched(attention, model, "auto, also quantised")
    close(sample(clone), sample(model))
    assert every == [*IN_AUTO, "quantised one"]
    assert list(made.record.used) == ["quantised one"]
    assert made.record.exactness() == "approximate"


def test_auto_times_again_at_another_length_only(attention, model, parts, monkeypatch) -> None:
    every = timed(parts, monkeypatch, {})
    clone, _ = patched(attention, model, "auto")
    sample(clone)
    once = len(every)
    sample(clone, sides=(42, 36))  # 378 tokens beside the text instead of 360: up to 512 as well
    assert len(every) == once
    sample(clone, sides=(20, 18))
    assert len(every) == 2 * once


def test_auto_without_memory_to_try_is_comfyui_s_own(attention, model, monkeypatch) -> None:
    import comfy.model_management

    clone, made = patched(attention, model, "auto")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1000)
        assert sample(clone).equal(sample(model))
    assert list(made.record.used) == ["ComfyUI's own"]
    assert list(made.record.notes) == ["too little free memory to time backends: ComfyUI's own"]
    sample(clone)  # this was not remembered
    assert made.record.times and not made.record.notes


@pytest.mark.parametrize(
    ("error", "why", "lasts"),
    [
        (torch.OutOfMemoryError, "out of memory when it was timed", False),
        (RuntimeError, "RuntimeError: too long", True),
    ],
    ids=["memory", "error"],
)
def test_a_candidate_that_fails_when_it_is_timed_is_told(
    attention, model, backend, error, why, lasts
) -> None:
    """Out of memory may be over in the next run; the rest is remembered, and told again."""

    def act(call: int) -> None:
        if call == 1:
            raise error("too long")

    counted = Counted(act)
    backend(counted)
    clone, made = patched(attention, model, "auto")
    close(sample(clone), sample(model))
    note = f"made up: {why}. Not used"
    assert list(made.record.notes) == [note] and counted.calls == 1
    facts = json.loads(json.dumps(made.record.facts(), allow_nan=False))
    (times,) = facts["milliseconds"]
    assert times["made up"] is None and times["not_timed"] == {"made up": why}
    assert times["chosen"] in made.record.used and times["ComfyUI's own"] > 0
    sample(clone)
    assert (counted.calls == 1) == lasts and list(made.record.notes) == [note] * lasts


def test_kinds_of_calls_have_times_of_their_own(attention) -> None:
    """Another number of queries than of keys; and with a mask."""
    options = attention_options(attention, "auto")
    made = options.pop("made")
    from comfy.ldm.modules.attention import attention_pytorch

    q, k = random(1, 30, 64), random(1, 77, 64, seed=2)
    hidden = torch.zeros(1, 1, 77)
    hidden[..., 60:] = torch.finfo(hidden.dtype).min
    for mask in (None, hidden):
        attention_pytorch(q, k, k, 2, mask=mask, transformer_options=options)
    line = made.record.line()
    assert " · at 32 queries, 128 keys: " in line
    assert " · at 32 queries, 128 keys, hidden keys: " in line


def test_what_a_model_wants_precise_is_not_quantised(attention, parts, backend) -> None:
    from comfy.ldm.modules.attention import attention_pytorch

    counted = Counted()
    made = attention.Attention(backend(counted, quantised=0.1))
    options: dict[str, Any] = {}
    parts.attention_override.put(options, parts.attention_override.BACKEND, made)
    q = random(1, 30, 64)
    more = {"transformer_options": options, "low_precision_attention": False}
    stock = attention_pytorch(q, q, q, 2)
    assert attention_pytorch(q, q, q, 2, **more).equal(stock) and counted.calls == 0
    assert any("asks for full precision" in note for note in made.record.notes)


# ------------------------------------------------------------------------------ other nodes
def test_a_later_choice_of_another_node_is_told(host, attention, model) -> None:
    clone, made = patched(attention, model, "split")
    choose = host.nodes.NODE_CLASS_MAPPINGS["ModelAttentionBackend"]().patch
    (later,) = choose(clone, "pytorch attention")
    assert sample(later).equal(sample(model))
    assert (
        list(made.record.notes) == [attention.REPLACED] and made.record.line() == attention.REPLACED
    )
    (before,) = choose(model, "pytorch attention")
    clone, made = patched(attention, before, "split")
    assert sample(clone).equal(sample(model))
    assert list(made.record.notes) == [attention.IGNORED]


def test_one_that_calls_on_is_no_obstacle(attention, model) -> None:
    clone, made = patched(attention, model, "split")
    slot = clone.model_options["transformer_options"]
    before = slot["optimized_attention_override"]
    slot["optimized_attention_override"] = lambda f, *a, **k: before(f, *a, **k)
    sample(clone)
    assert made.record.calls == CALLS and not made.record.notes


def test_a_model_with_attention_of_its_own_is_told(attention, model) -> None:
    clone, made = patched(attention, model, "split")
    clone.add_wrapper_with_key("diffusion_model", "own", lambda run, x, *a, **k: x * 0.5)
    sample(clone)
    assert list(made.record.notes) == [attention.NOT_ASKED]


def test_one_that_answers_some_calls_itself_is_told(attention, model) -> None:
    calls = []

    def every_other(function: Any, *args: Any, **more: Any) -> Tensor:
        calls.append(1)
        return stock_attention(*args, **more) if len(calls) % 2 else function(*args, **more)

    before = model.clone()
    before.model_options["transformer_options"]["optimized_attention_override"] = every_other
    clone, made = patched(attention, before, "split")
    sample(clone)
    assert (made.record.calls, len(calls)) == (CALLS // 2, CALLS)
    assert list(made.record.notes) == [
        "another node before this one computed 2 of 4 attention calls by itself"
    ]


def stock_attention(*args: Any, **more: Any) -> Tensor:
    """ComfyUI's, whatever stands in its slot."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **more)


def test_a_second_choice_counts_beyond_an_override_that_holds_the_first(attention, model) -> None:
    clone, first = patched(attention, model, "split")
    slot = clone.model_options["transformer_options"]
    before = slot["optimized_attention_override"]
    slot["optimized_attention_override"] = lambda f, *a, **k: before(f, *a, **k)
    again, second = patched(attention, clone, "sub-quadratic")
    sample(again)
    assert (first.record.calls, second.record.calls) == (0, CALLS)
    assert not second.record.notes


def test_a_second_choice_replaces_the_first(attention, model) -> None:
    clone, first = patched(attention, model, "split")
    again, second = patched(attention, clone, "sub-quadratic")
    sample(again)
    assert (first.record.calls, second.record.calls) == (0, CALLS)
    sample(clone)
    assert first.record.calls == CALLS  # the clone before is as it was


def test_neither_model_nor_tensors_are_kept(attention, model) -> None:
    clone, made = patched(attention, model, "auto")
    sample(clone)
    gone = weakref.ref(clone)
    del clone
    gc.collect()
    assert gone() is None and made.record.calls == CALLS
    held = [x for x in gc.get_objects() if isinstance(x, attention.Call)]
    assert held == []


# ------------------------------------------------------------------------------ the packages
def stand_in(monkeypatch, name: str, **functions: Any) -> None:
    """A module that is not installed here."""
    parent, _, child = name.rpartition(".")
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        package = sys.modules.get(parent) or ModuleType(parent)
        package.__path__ = []
        setattr(package, child, module)
        monkeypatch.setitem(sys.modules, parent, package)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """(batch, tokens, heads, width), as flash-attn and xFormers have it."""
    assert q.ndim == 4 and q.shape[2] == k.shape[2]
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), None, scale).transpose(1, 2)


def flash_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert dropout_p == 0.0 and not causal
    return tokens_first(q, k, v, softmax_scale)


def flash_3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None):
    return tokens_first(q, k, v, softmax_scale)


def flash_4(q, k, v, softmax_scale=None, causal=False, window_size=(None, None)):
    return tokens_first(q, k, v, softmax_scale), None  # sums of the softmax


def efficient(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return tokens_first(query, key, value, scale)


def sage_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    if smooth_k:
        k -= k.mean(dim=2, keepdim=True)  # as 1.0.6 does
    assert tensor_layout == "HND" and not kwargs
    return sdpa(q, k, v, None, sm_scale)


def sage_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kw):
    return sdpa(q, k, v, None, sm_scale)


def sage_3(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    assert attn_mask is None and "scale" not in kwargs
    return sdpa(q, k, v, None, None)


PACKAGES = {
    "flash-attn 2": ("flash_attn", {"flash_attn_func": flash_2}),
    "flash-attn 3": ("flash_attn_interface", {"flash_attn_func": flash_3}),
    "flash-attn 4": ("flash_attn.cute", {"flash_attn_func": flash_4}),
    "xFormers": ("xformers.ops", {"memory_efficient_attention": efficient}),
    "SageAttention 1": ("sageattention", {"sageattn": sage_1}),
    "SageAttention 2": (
        "sageattention",
        {"sageattn": sage_2, "sageattn_qk_int8_pv_fp16_cuda": sage_2},
    ),
    "SageAttention 3": ("sageattn3", {"sageattn3_blackwell": sage_3}),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_called_as_it_wants(parts, monkeypatch, name: str) -> None:
    """Against a function with its signature; the self-test sees layout, scale and keys."""
    from pack.core.attention import examine, mask_aware

    stand_in(monkeypatch, PACKAGES[name][0], **PACKAGES[name][1])
    backend = parts.attention_backends.BACKENDS[name]
    attend = mask_aware(backend.attend, backend.takes_masks)
    for kind in ("no mask", "hidden keys"):
        found = examine(attend, torch.device("cpu"), torch.bfloat16, 64, kind)
        assert found.healthy, found


@pytest.mark.parametrize("name", PACKAGES)
def test_probes_say_what_to_install(parts, monkeypatch, name: str) -> None:
    backend = parts.attention_backends.BACKENDS[name]
    module, functions = PACKAGES[name]
    for present in (module, module.partition(".")[0]):
        monkeypatch.setitem(sys.modules, present, None)  # an import fails as if it were missing
    assert backend.probe(CUDA).startswith("not installed: ") and len(backend.probe(CUDA)) > 25
    monkeypatch.delitem(sys.modules, module.partition(".")[0])
    stand_in(monkeypatch, module)  # of another version, without the function
    assert backend.probe(CUDA).startswith("not installed: ")
    stand_in(monkeypatch, module, **functions)
    assert backend.probe(torch.device("cpu")) == "it needs an NVIDIA or AMD graphics card"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert backend.probe(CUDA) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (4, 0))
    assert "compute capability 4.0, it needs" in backend.probe(CUDA)


def test_a_package_that_does_not_load_is_no_missing_one(parts, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sageattn3", raising=False)
    (tmp_path / "sageattn3.py").write_text("import no_such_library")
    probe = parts.attention_backends.BACKENDS["SageAttention 3"].probe
    assert probe(CUDA).startswith("installed, but it does not load (ModuleNotFoundError: No module")
    (tmp_path / "sageattn3.py").write_text("raise OSError('undefined symbol: cudaFoo')")
    importlib.invalidate_caches()
    assert "OSError: undefined symbol" in probe(CUDA)


def test_sage_1_leaves_the_keys_alone(parts, monkeypatch) -> None:
    """1.0.6 subtracts their mean in place: a reference cache's, or the next slice's."""
    stand_in(monkeypatch, "sageattention", sageattn=sage_1)
    q, k = random(1, 2, 9, 64), random(1, 2, 9, 64, seed=2)
    before = k.clone()
    parts.attention_backends.BACKENDS["SageAttention 1"].attend(q, k, k, None, None)
    assert k.equal(before)


# ------------------------------------------------------------------------------ the node
def graph(backend: str, **sampler: Any) -> dict[str, Any]:
    """A small picture with the node before its sampler."""
    made = small(**sampler)
    made["attention"] = node("QwenVRAMAttention", model=["shift", 0], backend=backend)
    made["sampler"]["inputs"]["model"] = ["attention", 0]
    made["report"] = node("PreviewAny", source=["attention", 1])
    return made


def test_the_node_reports_every_backend(host) -> None:
    run = host.run(graph("PyTorch SDPA"))
    assert latent(run).equal(latent(host.run(small())))
    report = run.outputs["attention"][1][0]
    first, *lines = report.splitlines()
    assert first == "PyTorch SDPA, on cpu, float32, heads 32 wide, no mask"
    module = host.part("nodes.attention_backends")
    assert [line.partition(":")[0] for line in lines] == list(module.BACKENDS)
    assert "\nPyTorch SDPA: healthy, error " in report
    assert "\nsplit: there, not tried: not asked for" in report
    assert "flash-attn 2: missing, not installed: `pip install flash-attn" in report
    assert "SDPA cuDNN: missing, it needs an NVIDIA or AMD graphics card" in report
    waits = "PyTorch SDPA: runs when a sampler runs with the model"
    assert run.status("attention") == {"text": waits, "report": report}


def test_the_node_shows_what_was_done(host, monkeypatch) -> None:
    """While the sampler runs, on the node of the patch."""
    told = []
    outcome = host.part("nodes.outcome")
    monkeypatch.setattr(outcome, "tell", lambda text, *ids: told.append((text, ids)))
    run = host.run(graph("auto", seed=3))
    report = run.outputs["attention"][1][0]
    assert report.count(": healthy, error") == len(ON_A_CPU)
    (text, ids), *_ = reversed(told)
    assert ids == ("attention",) and text.startswith("auto: ")
    assert " · at " in text and " keys: " in text and " ms" in text


def test_a_missing_backend_is_a_sentence(host) -> None:
    with pytest.raises(RunError) as failure:
        host.run(graph("flash-attn 2"))
    assert str(failure.value).startswith(
        "Attention: flash-attn 2 cannot run here: not installed: `pip install flash-attn"
    )


def test_every_backend_is_in_the_combo_always(host) -> None:
    kind = host.nodes.NODE_CLASS_MAPPINGS["QwenVRAMAttention"]
    (combo,) = (i for i in kind.GET_SCHEMA().inputs if i.id == "backend")
    assert combo.options == [
        "auto",
        "auto, also quantised",
        *host.part("nodes.attention_backends").BACKENDS,
    ]
    assert len(combo.options) == 17


def test_an_unknown_backend_is_a_sentence(attention) -> None:
    with pytest.raises(ValueError, match="there is no backend fast one"):
        attention.Attention("fast one")


def test_the_metadata_tells_what_was_used(host, attention) -> None:
    """As SaveImage would write it."""
    info = {"workflow": {"nodes": []}}
    seen = {}

    def write(self: Any, node_id: str | None, facts: dict[str, Any]) -> str:
        seen[node_id] = facts
        return ""

    assert inspect.signature(attention.Metadata.write).parameters.keys() >= {"node_id", "facts"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Metadata, "write", write)
        host.run(graph("split", seed=5))
    facts = seen["attention"]
    assert facts["backend"] == "split" and facts["used"] == ["split"] and info
    assert facts["exactness"] == "exact up to rounding" and facts["errors"]["split"] < 1e-5
    assert facts["notes"] == [] and facts["versions"]["torch"] == torch.__version__


def test_a_lora_before_or_behind_changes_nothing(host) -> None:
    before, behind = graph("split"), graph("split")
    lora = {"lora_name": LORA, "strength_model": 1.0}
    before["lora"] = node("LoraLoaderModelOnly", model=["shift", 0], **lora)
    before["attention"]["inputs"]["model"] = ["lora", 0]
    behind["lora"] = node("LoraLoaderModelOnly", model=["attention", 0], **lora)
    behind["sampler"]["inputs"]["model"] = ["lora", 0]
    assert latent(host.run(before)).equal(latent(host.run(behind)))
