"""Any figures give parts that add up, a report that survives JSON, and a text with all of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import memory_findings, memory_report, memory_text
from pack.core.fragments import Fragments, fragments
from pack.core.memory_findings import Finding, Ram
from pack.core.memory_report import Allocator, Device, Holding, Model, Probe
from pack.core.units import size_text
from pack.tests.examples import examples

GB = 10**9
MB = 10**6
ASYNC = Allocator("cudaMallocAsync", 900 * MB, 1100 * MB, why={"inactive_split": "no list."})
DIFFUSION = Model(
    name="qwen_image_2512_fp8_e4m3fn",
    kind="diffusion model",
    dtype="fp8_e4m3fn",
    device="cuda:0",
    bytes=20_430 * MB,
    resident_bytes=5_100 * MB,
    pages_bytes=5_100 * MB,
    ram_bytes=9_200 * MB,
    mapped_bytes=11_200 * MB,
    pinned_bytes=9_200 * MB,
    file="qwen_image_2512_fp8_e4m3fn.safetensors",
    identity="transformer",
    needed=True,
)
VAE = Model("vae", "VAE", "bf16", "cuda:0", 250 * MB, 250 * MB, ram_bytes=0, identity="vae")
ENCODER = Model(
    "te", "text encoder", "bf16", "cuda:0", 8 * GB, 3 * GB, ram_bytes=5 * GB, file="te.st"
)
NO_RAM_FIGURES = Ram()
RAM = Device("cpu", "RAM", "cpu", 34_200 * MB, 22_100 * MB, 12_600 * MB, 9_500 * MB)


def card(**changes: Any) -> Device:
    """An 8 GB card on which all is known and nothing unexplained."""
    usual: dict[str, Any] = {
        "device": "cuda:0",
        "name": "NVIDIA GeForce RTX 4060",
        "kind": "cuda",
        "total": 8_590 * MB,
        "used": 7_820 * MB,
        "own": 6_620 * MB,
        "other": 1_200 * MB,
        "allocator": ASYNC,
        "context": 420 * MB,
    }
    return Device(**{**usual, **changes})


def told(
    *devices: Device, models: tuple[Model, ...] = (), ram: Ram = NO_RAM_FIGURES
) -> dict[str, Any]:
    """The report of literal figures."""
    found = memory_findings.findings(devices, models, ram)
    listed = [finding._asdict() for finding in found]
    return memory_report.report(devices, models, listed, "2026-01-01T12:00:00Z", False)


def sizes(device: Device, *models: Model) -> dict[str, int | None]:
    """Bytes by the id of the part."""
    return {part.id: part.bytes for part in memory_report.parts(device, models)}


def found(
    *devices: Device, models: tuple[Model, ...] = (), ram: Ram = NO_RAM_FIGURES
) -> dict[str, Finding]:
    """Findings by id."""
    return {f.id: f for f in memory_findings.findings(devices, models, ram)}


# --------------------------------------------------------------------------------------- examples
def test_every_owner_is_a_part_and_nothing_is_left_over() -> None:
    assert sizes(card(), DIFFUSION, VAE) == {
        "other_processes": 1_200 * MB,
        "context": 420 * MB,
        "model:0": 5_100 * MB,
        "model:1": 250 * MB,
        "allocator_live": 650 * MB,  # 900 allocated, less the VAE; pages are not torch's
        "allocator_cache": 200 * MB,
        "unexplained": 0,
        "free": 770 * MB,
    }


def test_what_nobody_accounts_for_is_shown_with_its_sign() -> None:
    assert sizes(card(used=8 * GB, own=6_800 * MB), DIFFUSION, VAE)["unexplained"] == 180 * MB
    overlap = sizes(card(used=7 * GB, own=5_800 * MB), DIFFUSION, VAE)
    assert overlap["unexplained"] == -820 * MB


def test_models_that_claim_more_than_torch_has_make_the_rest_negative() -> None:
    big = Model("big", "other", "bf16", "cuda:0", GB, GB)
    parts = sizes(card(), DIFFUSION, big)
    assert "allocator_live" not in parts and parts["unexplained"] == -100 * MB
    assert found(card(), models=(DIFFUSION, big)).keys() >= {"other_processes"}


def test_without_figures_of_one_process_others_and_context_are_one_part() -> None:
    why = {"own_bytes": "it needs NVML."}
    parts = sizes(card(own=None, other=None, why=why), DIFFUSION, VAE)
    assert parts["rest"] == 1_620 * MB and parts["unexplained"] is None
    assert not {"other_processes", "context"} & parts.keys()


def test_what_others_took_at_the_start_leaves_the_growth_as_unexplained() -> None:
    device = card(own=None, other=None, at_start=1_500 * MB)
    parts = memory_report.parts(device, [DIFFUSION, VAE])
    by_id = {part.id: part for part in parts}
    assert by_id["others_at_start"].bytes == 1_500 * MB and by_id["unexplained"].bytes == 120 * MB
    assert "since ComfyUI started" in by_id["unexplained"].detail
    grown = found(card(own=None, other=None, at_start=GB), models=(DIFFUSION, VAE))
    assert "or another program." in grown["unexplained"].text


def test_what_others_gave_back_since_the_start_is_not_counted_twice() -> None:
    device = card(own=None, other=None, at_start=3 * GB)
    by_id = {part.id: part for part in memory_report.parts(device, [DIFFUSION, VAE])}
    assert by_id["others_at_start"].bytes == 1_620 * MB and by_id["unexplained"].bytes == 0
    assert by_id["others_at_start"].detail.endswith("others have given back 1.38 GB since")
    assert "counted_twice" not in found(device, models=(DIFFUSION, VAE))
    # More than they had cannot have been given back.
    big = Model("big", "other", "bf16", "cuda:0", 9 * GB, 9 * GB)
    assert sizes(device, big)["others_at_start"] == 0 > sizes(device, big)["unexplained"]


def test_pages_may_take_more_than_the_model_has() -> None:
    small = Model("small", "VAE", "bf16", "cuda:0", 20_600_000, 33_700_000, pages_bytes=33_700_000)
    (part,) = [p for p in memory_report.parts(card(), [small]) if p.id == "model:0"]
    assert part.detail == "20.6 MB; its pages take 33.7 MB"
    assert "Dynamic VRAM: 33.7 MB in pages" in memory_text.text(told(card(), models=(small,)))


def test_on_a_mac_the_others_are_no_finding_since_our_own_ram_is_among_them() -> None:
    assert "other_processes" in found(card(other=9 * GB))
    assert "other_processes" not in found(card(kind="mps", device="mps", other=9 * GB))


def test_models_that_are_not_needed_are_unloaded_and_no_others() -> None:
    idle = Model(**{**vars(DIFFUSION), "needed": False})
    assert found(card(), models=(idle,))["models_not_needed"].command == "QwenVRAM.Clear.Needed"


def test_without_the_driver_only_the_total_and_what_we_hold_are_known() -> None:
    parts = sizes(card(used=None, own=None, other=None), DIFFUSION)
    assert parts["free"] is None and parts["unexplained"] is None
    assert parts["unknown"] == 8_590 * MB - 5_100 * MB - 1_100 * MB


def test_with_nothing_known_there_is_no_invented_number() -> None:
    device = Device("privateuseone:0", "DirectML", "privateuseone", None, None, None, None)
    assert sizes(device) == {"unexplained": None, "free": None}
    text = memory_text.text(told(device))
    assert "not measurable, free not measurable" in text and " 0" not in text.split("\n")[2]


def test_ram_is_the_models_the_cache_and_the_rest_of_the_process() -> None:
    ram = Device(**{**vars(RAM), "holdings": (Holding("pack", "Prompt cache", 200 * MB),)})
    assert sizes(ram, DIFFUSION, VAE) == {
        "other_processes": 9_500 * MB,
        "model:0": 9_200 * MB,
        "pack": 200 * MB,
        "process": 3_200 * MB,
        "unexplained": 0,
        "free": 12_100 * MB,
    }
    larger = Model("large", "other", "bf16", "cpu", 13 * GB, 13 * GB, ram_bytes=13 * GB)
    assert sizes(RAM, larger)["unexplained"] == -400 * MB


def test_a_model_of_another_card_is_no_part_of_this_one() -> None:
    second = card(device="cuda:1")
    assert not [name for name in sizes(second, DIFFUSION) if name.startswith("model")]


def test_two_of_one_file_are_copies_and_two_dtypes_are_not() -> None:
    copy = Model(**{**vars(DIFFUSION), "ram_bytes": GB})
    other = Model(**{**vars(DIFFUSION), "dtype": "bf16"})
    listed = told(card(), models=(DIFFUSION, copy, other))["models"]
    assert [m["duplicate_of"] for m in listed] == [None, DIFFUSION.name, None]
    assert [m["name"] for m in listed] == [
        DIFFUSION.name,
        DIFFUSION.name + " #2",
        DIFFUSION.name,
    ]
    finding = found(card(), models=(DIFFUSION, copy))["duplicate_diffusion_model"]
    assert finding.saves_bytes == 6_100 * MB and finding.command == "QwenVRAM.MergeLoaders"
    assert finding.text.startswith("Two copies of the diffusion model qwen_image_2512_fp8")


def test_models_of_unknown_origin_are_never_called_copies() -> None:
    unknown = Model("QwenImage", "diffusion model", "bf16", "cuda:0", GB, GB)
    assert [m["duplicate_of"] for m in told(models=(unknown, unknown))["models"]] == [None, None]


# --------------------------------------------------------------------------------------- findings
def test_a_fragmented_heap_is_named_and_under_cuda_malloc_async_it_cannot_be() -> None:
    native = Allocator("native", 4 * GB, 7 * GB, 40 * MB, 2_900 * MB)
    heap = Fragments(2_950 * MB, 40 * MB, 2_900 * MB, 2_600 * MB, 211)
    finding = found(card(allocator=native, fragments=heap))["fragmentation"]
    assert finding.severity == "warning" and finding.action == memory_findings.UNLOAD
    assert finding.command == "QwenVRAM.Clear.Models"
    listed = memory_findings.findings(
        [card(allocator=native, fragments=heap)], [], Ram(), async_by="Do so."
    )
    (advised,) = [each for each in listed if each.id == "fragmentation"]
    assert (advised.action, advised.command) == ("Do so.", None)
    assert "2.60 GB of cuda:0 lie in 211 fragments smaller than 64 MB" in finding.text
    unread = found(card(allocator=native))
    assert "fragmentation" not in unread and "free_between_blocks" in unread
    assert not {"fragmentation", "free_between_blocks"} & found(card()).keys()
    said = told(card())["devices"][0]["not_measurable"]
    assert {"what": "fragmentation", "why": "no list."} in said


@pytest.mark.parametrize(
    ("name", "device", "models", "ram"),
    [
        ("other_processes", card(other=2 * GB, own=5_820 * MB), (), Ram()),
        ("allocator_cache", card(allocator=Allocator("native", GB, 3 * GB, GB, 0)), (), Ram()),
        ("unexplained", card(used=8_500 * MB, own=7_300 * MB), (DIFFUSION, VAE), Ram()),
        ("counted_twice", card(used=7 * GB, own=5_800 * MB), (DIFFUSION, VAE), Ram()),
        ("ram_full", Device(**{**vars(RAM), "used": 33 * GB}), (), Ram(swap_used=GB)),
        ("pinned", RAM, (), Ram(pinned=20 * GB)),
        ("models_not_needed", card(), (Model(**{**vars(DIFFUSION), "needed": False}),), Ram()),
    ],
)
def test_what_stands_out_is_found(name: str, device: Device, models: Any, ram: Ram) -> None:
    finding = found(device, models=models, ram=ram)[name]
    assert finding.text.endswith((".", "again.")) and finding.action.endswith(".")


def test_a_calm_machine_has_no_findings() -> None:
    calm = card(other=300 * MB, used=6_920 * MB)
    assert found(calm, RAM, models=(DIFFUSION, VAE)) == {}
    assert "Nothing stands out." in memory_text.text(told(RAM))


def test_what_others_found_is_sorted_in() -> None:
    more = [Finding("allocator", "warning", "It does harm.", "Remove it.")]
    full = Device(**{**vars(RAM), "used": 34 * GB, "other": 21_400 * MB})
    listed = memory_findings.findings([full], [], Ram(pinned=30 * GB), more)
    assert [finding.id for finding in listed] == ["ram_full", "allocator", "pinned"]


def test_the_worst_comes_first() -> None:
    full = Device(**{**vars(RAM), "used": 34 * GB})
    severities = [
        f.severity for f in memory_findings.findings([card(), full], [], Ram(pinned=30 * GB))
    ]
    assert severities == sorted(severities, key=["problem", "warning", "info"].index)
    assert len(severities) > 2


# -------------------------------------------------------------------------------------- fragments
def block(size: int, live: bool) -> dict[str, Any]:
    return {"size": size, "state": "active_allocated" if live else "inactive"}


def test_fragments_are_what_lies_between_live_blocks() -> None:
    snapshot = [
        {"device": 0, "blocks": [block(10 * MB, True), block(30 * MB, False), block(1, True)]},
        {"device": 0, "blocks": [block(500 * MB, False)]},  # goes back with the cache
        {"device": 0, "blocks": [block(5, True), block(200 * MB, False)]},
        {"device": 1, "blocks": [block(5, True), block(900 * MB, False)]},
    ]
    assert fragments(snapshot, 0) == Fragments(730 * MB, 500 * MB, 230 * MB, 30 * MB, 1)
    assert fragments([], 0) == Fragments(0, 0, 0, 0, 0)


# ------------------------------------------------------------------------------------ any figures
some = st.integers(0, 10**13)
maybe = st.none() | some
names = st.text(max_size=40)
models = st.lists(
    st.builds(
        Model,
        name=names,
        kind=st.sampled_from(["diffusion model", "text encoder", "VAE", "other"]),
        dtype=names,
        device=st.sampled_from(["cuda:0", "cuda:1", "cpu", "mps"]),
        bytes=some,
        resident_bytes=maybe,
        pages_bytes=some,
        ram_bytes=maybe,
        mapped_bytes=some,
        pinned_bytes=maybe,
        file=st.none() | names,
        identity=st.none() | st.sampled_from("ab"),
        needed=st.none() | st.booleans(),
    ),
    max_size=5,
)
devices = st.builds(
    Device,
    device=st.sampled_from(["cuda:0", "cuda:1", "mps"]),
    name=names,
    kind=st.sampled_from(["cuda", "mps", "xpu", "cpu", "privateuseone"]),
    total=maybe,
    used=maybe,
    own=maybe,
    other=maybe,
    why=st.dictionaries(st.sampled_from(["own_bytes", "used_bytes"]), names),
    allocator=st.none() | st.builds(Allocator, names, some, some, maybe, maybe),
    fragments=st.none() | st.builds(Fragments, some, some, some, some, some),
    holdings=st.lists(st.builds(Holding, st.just("pack"), names, some, st.booleans()), max_size=2),
    context=maybe,
    at_start=maybe,
    probe=st.none() | st.builds(Probe, maybe, names),
)


@settings(max_examples=examples(40), deadline=None)
@given(device=devices, known=models)
def test_any_figures_add_up_to_the_total(device: Device, known: list[Model]) -> None:
    parts = memory_report.parts(device, known)
    if device.total is not None:
        assert sum(part.bytes for part in parts if part.bytes is not None) == device.total
    assert all(
        part.bytes is None or part.bytes >= 0
        for part in parts
        if part.id not in ("unexplained", "free")
    )


@settings(max_examples=examples(40), deadline=None)
@given(every=st.lists(devices, max_size=3), known=models, ram=st.builds(Ram, maybe, some))
def test_any_report_survives_json_and_its_text_has_every_part(every, known, ram) -> None:
    whole = told(*every, models=tuple(known), ram=ram)
    assert json.loads(json.dumps(whole)) == whole
    text = memory_text.text(whole)
    for device in whole["devices"]:
        for part in device["parts"]:
            assert part["label"] in text and memory_text.amount(part["bytes"]) in text
        for missing in device["not_measurable"]:
            assert missing["why"] in text
    assert all(finding["action"] in text for finding in whole["findings"])


def test_a_probe_is_told() -> None:
    text = memory_text.text(told(card(probe=Probe(700 * MB, "So it is."))))
    assert "Largest allocation now: 700.0 MB. So it is." in text


def test_sizes_are_decimal() -> None:
    assert [size_text(n) for n in (0, 999_900_000, GB, -2 * GB)] == [
        "0.0 MB",
        "999.9 MB",
        "1.00 GB",
        "-2.00 GB",
    ]
