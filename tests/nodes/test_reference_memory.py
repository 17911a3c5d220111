"""How much the reference cache will hold, where there is room for it, and what the report says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.core.reference_store import FORMATS
from pack.tests.graphs import UNET
from pack.tests.nodes.slicing_models import conditioning, random, sample

GB = 1_000_000_000
CUDA, CPU, MPS = (torch.device(name) for name in ("cuda", "cpu", "mps"))
SIDES = (12, 10)


@pytest.fixture(scope="module")
def memory(host) -> ModuleType:
    """nodes/reference_memory.py of the loaded pack."""
    return host.part("nodes.reference_memory")


@pytest.fixture(scope="module")
def model(host) -> Iterator[Any]:
    """A tiny model that no test changes."""
    import comfy.model_management

    path = host.models / "diffusion_models" / UNET
    loading = torch.inference_mode()(host.part("nodes.architectures").load_transformer)
    yield loading(str(path), {})
    comfy.model_management.unload_all_models()
    gc.collect()


# ------------------------------------------------------------------------------------ how much
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_run_holds_was_expected(host, memory, model, format: str, batch: int) -> None:
    cache = host.part("nodes.reference_cache")
    own = cache.ReferenceCache(cache.Settings(refresh="first step", store_format=format))
    sides = ((10, 12), (8, 7))  # the second one is padded: 30 and 16 tokens
    both = {"reference_latents": [random(1, 16, 1, *side, seed=3) for side in sides]}
    positive, negative = conditioning(**both), conditioning(9, seed=8, **both)
    sample(own.patch(model), positive, negative, SIDES, batch=batch)
    held = sum(own.record.bytes_held.values())
    conds = {"positive": [both], "negative": [both]}
    shape = (batch, 16, 1, *SIDES)
    assert held == memory.expected_bytes(model, conds, shape, format) > 0
    # Keys and values of two sides of CFG, (10 * 12 + 8 * 8) / 4 tokens, 4 heads of 32, 2 blocks
    exact = 2 * 2 * batch * 46 * 4 * 32 * 2 * model.model.get_dtype_inference().itemsize
    assert memory.expected_bytes(model, conds, shape, "model") == exact


def test_what_is_kept_for_tiles_or_of_the_picture_counts(memory, model) -> None:
    one = {"reference_latents": [random(1, 16, 1, 4, 4)]}
    conds = {"positive": [one, {}], "negative": [one]}  # a condition without references: nothing

    def of(**more: Any) -> int:
        return memory.expected_bytes(model, conds, (1, 16, 1, 8, 8), "model", **more)

    assert of(parts=3) == 3 * of()
    assert (
        of(more_tokens=4) == 2 * of() + of() / 2
    )  # 3 conditions have them, without references too
    assert memory.expected_bytes(model, {"positive": [{}]}, (1, 16, 1, 8, 8), "model") == 0


def test_at_a_scale_of_1_the_negative_side_has_no_store(memory) -> None:
    conds = {"positive": [1], "negative": [2]}
    assert memory.computed(conds, SimpleNamespace(cfg=1.0), {}) == {"positive": [1]}
    assert memory.computed(conds, SimpleNamespace(cfg=4.0), {}) == conds
    assert memory.computed(conds, SimpleNamespace(), {}) == conds  # a guider of another kind
    off = {"disable_cfg1_optimization": True}
    assert memory.computed(conds, SimpleNamespace(cfg=1.0), off) == conds


def test_within_a_limit_a_pass_has_as_many_pictures_as_there_are(host, memory, model) -> None:
    """There the shape that the load is planned with has a batch that nobody samples."""
    limited = model.clone()
    own = limited.model_options["transformer_options"]
    shape, enlarged = [2, 16, 1, 2000, 2000], [900.5, 16, 1, 2000, 2000]
    whole = memory.activations_of(model, shape, {})
    assert memory.activations_of(model, enlarged, {}, 2) > 100 * whole
    own[memory.LIMIT] = GB
    assert memory.activations_of(limited, enlarged, {}, 2) == whole


# --------------------------------------------------------------------------------------- where
class Card:
    """A computer as the choice of a place sees it."""

    def __init__(self, memory: ModuleType, monkeypatch: Any) -> None:
        self.free, self.ram, self.loaded = 24 * GB, 64 * GB, []
        self.limit, self.dynamic, self.resident = 0, False, 0
        self.memory = memory
        monkeypatch.setattr(memory.mm, "get_free_memory", lambda device: self.ram)
        monkeypatch.setattr(memory.mm, "minimum_inference_memory", lambda: 1 * GB)
        monkeypatch.setattr(memory.loaded_models, "loaded", lambda: self.loaded)

    def place(self, wanted: str, need: float, device: torch.device = CUDA) -> tuple[str, str]:
        """Of a model of 12 GB whose passes need 3."""
        model = SimpleNamespace(
            get_free_memory=lambda _: self.free,
            model_size=lambda: 12 * GB,
            is_dynamic=lambda: self.dynamic,
            loaded_size=lambda: self.resident,
            model_options={"transformer_options": {self.memory.LIMIT: self.limit}},
        )
        return self.memory.place_for(wanted, round(need * GB), device, model, 3 * GB)


@pytest.fixture
def card(memory, monkeypatch) -> Card:
    """24 GB, and 64 GB of RAM."""
    return Card(memory, monkeypatch)


def test_auto_takes_the_gpu_where_more_is_spare_than_the_store(card: Card) -> None:
    assert card.place("auto", 7.2) == ("gpu", "")  # 24 - 12 - 3 are 9: a quarter more than 7.2
    assert card.place("auto", 7.3) == ("ram", "")


def test_auto_takes_a_third_of_the_ram_at_most(card: Card) -> None:
    card.free = 8 * GB
    assert card.place("auto", 21)[0] == "ram"
    place, why = card.place("auto", 22)
    assert (
        place == "" and "22.00 GB" in why and "0.0 MB to spare" in why and "64.00 GB of RAM" in why
    )


def test_where_ram_is_short_some_weights_leave_the_gpu(card: Card) -> None:
    card.free, card.ram = 12 * GB, 8 * GB  # 9 without weights
    assert card.place("auto", 2.6) == ("ram", "")
    place, why = card.place("auto", 3)
    assert place == "gpu" and "3.00 GB" in why and "streamed" in why
    place, why = card.place("auto", 3.1)
    assert place == "" and "9.00 GB with all weights in RAM" in why


def test_what_the_load_moves_away_counts_as_free(card: Card) -> None:
    """Other models' weights leave, and this one's own are not counted twice."""
    card.free = 4 * GB
    assert card.place("auto", 2)[0] == "ram"
    kinds = {"dynamic": True, "not": False}
    entries = {
        name: (
            SimpleNamespace(device=CUDA),
            SimpleNamespace(is_dynamic=lambda d=d: d, loaded_size=lambda: 20 * GB),
        )
        for name, d in kinds.items()
    }
    card.loaded = [entries["not"]]
    assert card.place("auto", 7)[0] == "gpu"
    card.loaded = [entries["dynamic"]]  # whose pages ComfyUI counts as free already
    assert card.place("auto", 2)[0] == "ram"


def test_a_vram_limit_counts(card: Card) -> None:
    card.free = 80 * GB
    assert card.place("auto", 10)[0] == "gpu"
    card.limit = 16 * GB  # 1 beside weights and activations
    assert card.place("auto", 10)[0] == "ram"
    assert card.place("auto", 0.7)[0] == "gpu"
    assert card.place("gpu", 11)[0] == ""


def test_the_users_word_counts_where_it_can(card: Card) -> None:
    place, why = card.place("gpu", 10)
    assert place == "gpu" and "10.00 GB" in why and "9.00 GB" in why  # some weights are streamed
    assert card.place("gpu", 5) == ("gpu", "")
    place, why = card.place("gpu", 20)
    assert place == "" and "20.00 GB" in why and "21.00 GB" in why
    assert card.place("ram", 1) == ("ram", "") and card.place("ram", 60)[0] == "ram"
    place, why = card.place("ram", 70)
    assert place == "" and "70.00 GB" in why and "64.00 GB" in why
    with pytest.raises(ValueError, match="store_place is one of auto, gpu, ram, not disk"):
        card.place("disk", 1)


def test_on_the_cpu_it_is_ram_and_on_apples_there_is_one_memory(card: Card) -> None:
    card.ram = 9 * GB
    assert card.place("auto", 3, CPU) == ("ram", "") and card.place("auto", 3.1, CPU)[0] == ""
    place, why = card.place("gpu", 8, CPU)
    assert place == "ram" and "runs in RAM" in why
    for wanted in ("auto", "gpu", "ram"):  # no other place would have room
        place, why = card.place(wanted, 10, CPU)
        assert place == "" and "Set store_place" not in why and "A smaller store_format" in why
        assert ("a third" in why) == (wanted == "auto")
    card.free, card.ram = 16 * GB, 64 * GB
    assert card.place("auto", 5, MPS)[0] == "" and card.place("auto", 0.8, MPS) == ("gpu", "")


@given(need=st.integers(0, 40), free=st.integers(0, 40), ram=st.integers(0, 80))
def test_auto_never_takes_what_is_not_there(memory, need: int, free: int, ram: int) -> None:
    place, why = memory._choose("auto", need, free, free - 12, ram, False)
    fits = {"gpu": need <= max(free - 12, free / 3), "ram": 3 * need <= ram, "": True}
    assert fits[place] and bool(why) == (place == "" or need > max(0, free - 12) and place == "gpu")
    smaller = memory._choose("auto", need // 2, free, free - 12, ram, False)[0]
    assert place == "" or smaller != ""  # what has room has room with less


# ------------------------------------------------------------------------------------ the load
def test_the_load_leaves_room_for_the_store(memory) -> None:
    """ComfyUI's own arithmetic of how many weights it loads (load_models_gpu)."""
    blocks = SimpleNamespace(transformer_blocks=[None] * 60)
    inner = SimpleNamespace(
        diffusion_model=blocks, memory_required=lambda shape, **_: shape[0] * shape[2] * 1000
    )
    model = SimpleNamespace(model=inner)
    usual = [1, 16, 500, 3]
    for place, kept in (("gpu", 3 * GB), ("ram", GB // 10)):  # two of 60 blocks are staged
        planned = memory.for_the_load(model, usual, 3 * GB, place)
        assert inner.memory_required(planned) - inner.memory_required(usual) == pytest.approx(kept)
        assert planned[1:] == usual[1:]


# -------------------------------------------------------------------------- the report, and pins
def test_the_report_names_what_living_stores_hold(host, memory) -> None:
    sources = host.part("nodes.memory_sources")

    def told() -> int:
        gc.collect()
        (ram,) = sources.gather()["devices"]
        parts = [part for part in ram["parts"] if part["id"] == "reference_cache"]
        assert all(part["label"].startswith("Reference cache") for part in parts)
        return sum(part["bytes"] for part in parts)

    assert told() == 0
    store = memory.new_store("int8", "ram", CPU)
    store.put(0, random(1, 2, 40, 32), random(1, 2, 40, 32))
    held = store.bytes_held["ram"]
    other = memory.new_store("model", "gpu", CPU)
    other.put(0, random(1, 2, 40, 32), random(1, 2, 40, 32))
    assert told() == held + other.bytes_held["gpu"]
    other.release()
    assert told() == held
    del store
    assert told() == 0


def test_pins_stay_within_comfyuis_limit(memory, monkeypatch) -> None:
    """Beyond it, ComfyUI would take the pins of a model's weights away for them."""
    pinned: dict[int, int] = {}

    def pin(tensor: torch.Tensor) -> bool:
        pinned[tensor.data_ptr()] = tensor.nbytes
        monkeypatch.setattr(memory.mm, "TOTAL_PINNED_MEMORY", sum(pinned.values()))
        return True

    monkeypatch.setattr(memory.mm, "pin_memory", pin)
    monkeypatch.setattr(memory.mm, "unpin_memory", lambda tensor: pinned.pop(tensor.data_ptr()))
    monkeypatch.setattr(memory.mm, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(memory.mm, "MAX_PINNED_MEMORY", 50_000)
    store = memory.new_store("model", "ram", CPU)
    for block in range(4):  # of 20,480 bytes each
        store.put(block, random(1, 2, 40, 32), random(1, 2, 40, 32))
    assert list(pinned.values()) == [20_480, 20_480]
    store.release()
    assert not pinned
    monkeypatch.setattr(memory.mm, "MAX_PINNED_MEMORY", -1)  # where ComfyUI pins nothing
    store.put(0, random(1, 2, 40, 32), random(1, 2, 40, 32))
    assert not pinned
