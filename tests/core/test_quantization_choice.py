"""What auto takes: it runs there, it has room there, and it loses no more than it must."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core import quantization
from pack.core.checkpoint import TEXT_ENCODER, TRANSFORMER
from pack.core.format_support import HIP_KERNELS, Machine, has_kernels, int4_for, obstacle, slowness
from pack.core.quantization import FORMATS
from pack.core.quantization_choice import FLOATS, OTHER, PLAIN_FP8, SLACK, WORKING, File, choose
from pack.core.qwen_layers import published

GIB = 2**30
ALL = frozenset({"bitsandbytes", "comfy-kitchen"})
HOST_DTYPES = {"default", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2"}  # fp32: of an fp64 encoder
STORED = ("int8", "w4a8", "w4a4", "nvfp4", "mxfp8", "bnb_nf4", "bnb_fp4", "bnb_int8")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, **{f.name: f.bits for f in FORMATS.values()}}


def sizes_of(folder: str, preset: str) -> dict[str, int]:
    """Bytes of a published model in each format."""
    layers, sizes = published()[folder], {}
    for name in FORMATS:
        plan = quantization.plan(layers, name, quantization.presets()[folder][preset])
        rest = sum(a * b for layer, (a, b) in layers.items() if layer not in plan)
        sizes[name] = 2 * rest + sum(quantization.bytes_of(f, layers[n]) for n, f in plan.items())
    return sizes


SIZES = {f: [sizes_of(f, p) for p in ("balanced", "smallest")] for f in published()}


def of_kind(kind: str, dtype: str) -> File:
    """A published model of that dtype, with what it would take in each format."""
    folder = "text_encoders" if kind == TEXT_ENCODER else "diffusion_models"
    parameters = sum(a * b for a, b in published()[folder].values())
    stored = parameters * BITS.get(dtype, 8) // 8
    return File(kind, dtype, stored, parameters, *(SIZES[folder] if dtype in FLOATS else ()))


FILES = {
    (kind, dtype): of_kind(kind, dtype)
    for kind in (TRANSFORMER, TEXT_ENCODER)
    for dtype in (*FLOATS, *STORED)
}
FP8, BF16 = FILES[TRANSFORMER, "fp8_e4m3fn"], FILES[TRANSFORMER, "bf16"]
E5M2 = FILES[TRANSFORMER, "fp8_e5m2"]


def card(name: str, capability: tuple[int, int], vram: float, ram: float, **more) -> Machine:
    """An NVIDIA card with dynamic VRAM, as ComfyUI finds it; sizes in GiB."""
    known = {"device": "cuda", "cuda": (13, 0), "dynamic_vram": True, "packages": ALL, **more}
    free = {"vram_free": int((vram - 0.7) * GIB), "ram_free": int((ram - 3) * GIB)}
    total = {"vram_total": int(vram * GIB), "ram_total": int(ram * GIB)}
    return Machine(name=name, capability=capability, **{**free, **total, **known})


def bare(device: str, ram: float, **more) -> Machine:
    """A machine without memory of its own on the device."""
    none = {"vram_total": 0, "vram_free": 0, "cuda": None, "dynamic_vram": False, "packages": ALL}
    sizes = {"ram_total": int(ram * GIB), "ram_free": int((ram - 3) * GIB)}
    return Machine(device=device, name=device, capability=None, **{**none, **sizes, **more})


CARDS = st.sampled_from(
    [
        *(("cuda", c) for c in ((6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0))),
        *(("cuda", (12, 0)), ("rocm", None), ("mps", None), ("xpu", None), ("cpu", None)),
        ("privateuseone", None),
    ]
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Any card, build, memory and set of packages."""
    device, capability = draw(CARDS)
    vram = draw(st.integers(4, 141)) * GIB if device not in ("cpu", "mps") else 0
    ram = draw(st.integers(4, 256)) * GIB
    dynamic = device == "cuda" and draw(st.booleans())
    return Machine(
        device=device,
        name=draw(st.sampled_from(["NVIDIA GeForce RTX 4070", "GTX 1660", "any card"])),
        capability=capability,
        cuda=draw(st.sampled_from([(11, 8), (12, 8), (13, 0)])) if device == "cuda" else None,
        vram_total=vram,
        vram_free=int(vram * draw(st.floats(0.1, 1))),
        ram_total=ram,
        ram_free=int(ram * draw(st.floats(0.05, 1))),
        dynamic_vram=dynamic,
        packages=frozenset(draw(st.sets(st.sampled_from([*ALL, HIP_KERNELS])))),
        pins_blindly=dynamic and draw(st.booleans()),
        pinnable=draw(st.none() | st.integers(0, ram)),
    )


@given(st.sampled_from(list(FILES.values())), machines())
def test_what_auto_takes_runs_there(file: File, machine: Machine) -> None:
    choice = choose(file, machine)
    name = choice.weight_dtype
    assert name in HOST_DTYPES | FORMATS.keys()
    if file.dtype not in FLOATS:
        assert name == "default"  # never twice
    if name in FORMATS:
        assert not obstacle(name, machine)
    if machine.device == "mps" and file.dtype in FLOATS:
        assert not name.startswith("fp8") and not (name == "default" and "fp8" in file.dtype)
    if name == "int8" and file.kind == TRANSFORMER:
        assert has_kernels(name, machine)  # without them it is slow
    assert choice.preset is None or (choice.preset == "smallest" and name in ("bnb_nf4", "w4a8"))
    assert "\n" not in choice.why and len(choice.why) < 320


@given(st.sampled_from([FILES[TRANSFORMER, dtype] for dtype in FLOATS]), machines())
def test_plain_fp8_that_is_kept_is_named_where_the_card_may_have_to_stream(file, machine) -> None:
    """There LoRAs are added as it computes; elsewhere ComfyUI's default merges them once."""
    choice = choose(file, machine)
    name, both = choice.weight_dtype, file.bytes + OTHER[TRANSFORMER] + WORKING
    holds_fp8 = machine.device in ("cuda", "rocm", "xpu", "cpu")
    if name in (*PLAIN_FP8, "default"):
        named = file.dtype in PLAIN_FP8 and holds_fp8 and both > machine.vram_free
        assert name == (file.dtype if named else "default")
    assert ("; LoRAs added as it computes" in choice.why) is (name in PLAIN_FP8)
    assert name not in PLAIN_FP8 or "kept as fp8" in choice.why


@given(st.sampled_from([FILES[TEXT_ENCODER, dtype] for dtype in FLOATS]), machines())
def test_a_text_encoder_is_never_named_in_fp8(file: File, machine: Machine) -> None:
    choice = choose(file, machine)
    assert choice.weight_dtype not in PLAIN_FP8 and "LoRA" not in choice.why


@given(st.sampled_from(list(FILES.values())), machines())
def test_what_is_quantised_to_save_memory_has_room_and_less_would_not(file, machine) -> None:
    choice = choose(file, machine)
    name = choice.weight_dtype
    if name not in FORMATS or machine.device == "mps":
        return
    sizes = file.smallest if choice.preset else file.sizes
    assert sizes[name] + SLACK <= machine.ram_free
    if choice.preset and "bitsandbytes" in machine.packages:
        assert file.sizes["bnb_nf4"] + SLACK > machine.ram_free or machine.pins_blindly
    if FORMATS[name].bits == 4:
        eight = file.sizes["bnb_int8"]
        fits = eight + SLACK <= machine.ram_free and eight < 0.99 * file.bytes
        assert not fits or machine.pins_blindly


@given(st.sampled_from(list(FILES.values())), machines(), st.integers(1, 64))
def test_more_memory_never_costs_precision(file: File, machine: Machine, more: int) -> None:
    richer = replace(machine, ram_free=machine.ram_free + more * GIB)
    poor, rich = (choose(file, m) for m in (machine, richer))
    before, after = poor.weight_dtype, rich.weight_dtype
    if before not in FORMATS and after in FORMATS:  # it went to the disk, or swapped, before
        assert "disk" in poor.why or "swap" in poor.why
    else:
        assert BITS.get(after, 16) >= BITS.get(before, 0)
        assert rich.preset is None or poor.preset or before not in FORMATS


@given(st.sampled_from([FP8, BF16]), machines())
def test_other_programs_count_the_total_does_not(file: File, machine: Machine) -> None:
    other = replace(machine, ram_total=1 << 50, vram_total=1 << 50)
    assert choose(file, other).weight_dtype == choose(file, machine).weight_dtype


RTX_4070 = ("NVIDIA GeForce RTX 4070", (8, 9), 12)
RTX_5060, H200 = ("RTX 5060", (12, 0), 8), ("H200", (9, 0), 12)
RTX_3060 = ("NVIDIA GeForce RTX 3060", (8, 6), 12)
RTX_3090 = ("NVIDIA GeForce RTX 3090", (8, 6), 24)


@pytest.mark.parametrize(
    ("file", "machine", "taken", "said"),
    [
        (FP8, card(*RTX_4070, 32), "fp8_e4m3fn", "(20.4 GB), streamed from the RAM; LoRAs added"),
        (BF16, card(*RTX_4070, 64), "bf16", "int8 would save 20.4 GB"),
        (BF16, card(*RTX_4070, 32), "int8", "does not hold the file's 40.8 GB; too little RAM to"),
        (BF16, card(*RTX_4070, 48), "int8", "file's 40.8 GB beside a text encoder"),
        (BF16, card(*RTX_4070, 32, cuda=(12, 8)), "bnb_int8", "does not hold the file's"),
        (BF16, card(*RTX_4070, 24), "int8", "no room for both models"),
        (BF16, card(*RTX_3090, 32), "int8", "does not hold the file's"),  # 24 + 32 GB are not 56
        (BF16, card(*RTX_4070, 20), "w4a8", "does not hold the file's"),
        (BF16, card(*RTX_4070, 20, cuda=(12, 8)), "bnb_nf4", "no room for both models"),
        (FP8, card(*RTX_4070, 20), "w4a8", "does not hold the file's 20.4 GB"),
        (FP8, card(*RTX_4070, 24), "fp8_e4m3fn", "the RAM holds its 20.4 GB, but not both models"),
        (FP8, card(*H200[:2], 141, 16), "default", "the card holds its 20.4 GB"),
        (FP8, card(*RTX_4070, 10), "fp8_e4m3fn", "every step reads the disk; LoRAs added as it"),
        (BF16, card(*RTX_4070, 10), "bf16", "every step reads the disk; take the fp8 file"),
        (FP8, card(*RTX_3060, 64), "fp8_e4m3fn", "kept as fp8"),
        (FP8, card(*RTX_3060, 64, cuda=(12, 8)), "fp8_e4m3fn", "kept as fp8"),
        (FP8, card(*RTX_3060, 64, dynamic_vram=False), "fp8_e4m3fn", "in part moved at each use"),
        (FP8, card("RTX 2080", (7, 5), 8, 64), "fp8_e4m3fn", "int8 in int8: whether faster was"),
        (FP8, card("NVIDIA GeForce GTX 1660", (7, 5), 6, 64), "fp8_e4m3fn", "kept as fp8"),
        (FP8, card("Tesla P40", (6, 1), 24, 64), "fp8_e4m3fn", "the card holds its 20.4 GB; LoRA"),
        (FP8, card(*RTX_3090, 64), "fp8_e4m3fn", "the card holds its 20.4 GB; LoRAs added as it"),
        (FP8, card("RTX 5090", (12, 0), 32, 64), "default", "the card holds its 20.4 GB"),
        (FP8, card("A100", (8, 0), 40, 64), "default", "the card holds"),
        (E5M2, card(*RTX_4070, 32), "fp8_e5m2", "kept as fp8"),
        (FILES[TRANSFORMER, "fp8_scaled"], card(*RTX_4070, 32), "default", "kept as fp8"),
        (FILES[TRANSFORMER, "nvfp4"], card("RTX 5070", (12, 0), 12, 32), "default", "is quantised"),
        (FP8, bare("privateuseone", 64), "default", "in part moved at each use; int8 would save"),
        (FP8, bare("mps", 64), "bf16", "holds no fp8"),
        (FP8, bare("mps", 32), "bnb_int8", "holds no fp8"),
        (FP8, bare("mps", 8), "bnb_nf4", "the system will swap"),
        (BF16, bare("cpu", 64), "bf16", "the RAM holds its 40.8 GB"),
        (FP8, bare("cpu", 64), "fp8_e4m3fn", "kept as fp8: the RAM holds its 20.4 GB; LoRAs added"),
        (FILES[TRANSFORMER, "fp16"], card(*RTX_4070, 64), "bf16", "converted to bf16 (40.8 GB)"),
        (FILES[TEXT_ENCODER, "fp8_scaled"], card(*RTX_3060, 32), "default", "kept as fp8"),
        (FILES[TEXT_ENCODER, "bf16"], card(*RTX_5060, 32), "int8", "beside a diffusion"),
        (FILES[TEXT_ENCODER, "bf16"], card(*RTX_5060, 10), "bnb_nf4", "preset smallest (4.6 GB)"),
        (BF16, card(*H200, 64), "bf16", "int8 would save 20.4 GB and cost 10 % of a step"),
        (FP8, card(*RTX_3060, 32), "fp8_e4m3fn", "kept as fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_users_have(file: File, machine: Machine, taken: str, said: str) -> None:
    choice = choose(file, machine)
    assert (choice.weight_dtype, said in choice.why) == (taken, True), choice


def test_the_line_has_the_numbers_that_decided() -> None:
    machine = card(*RTX_4070, 32)
    assert choose(FP8, machine).why == (
        "auto: fp8 file, RTX 4070, free: 12.1 GB VRAM, 31.1 GB RAM: kept as fp8 (20.4 GB), "
        "streamed from the RAM; LoRAs added as it computes; int8 would save nothing"
    )


@pytest.mark.parametrize(
    ("file", "name", "ram", "pinnable", "said"),
    [
        (FP8, RTX_5060, 32, 13.7, True),  # Windows: 40 % of the RAM; 8 GB of VRAM
        (FP8, RTX_5060, 24, 10.3, True),
        (FP8, RTX_5060, 64, 27.5, False),
        (FP8, RTX_4070, 32, 13.7, False),  # 12 GB: what streams is less
        (FP8, RTX_3090, 32, 13.7, False),  # nothing streams
        (BF16, RTX_4070, 64, 27.5, True),
        (BF16, RTX_5060, 48, 13.7, True),  # int8, quantised at load
        (BF16, RTX_4070, 32, 13.7, False),  # the RAM is too little anyway, which it says
    ],
)
def test_it_says_where_comfyui_pins_less_than_streams(
    file: File, name: tuple, ram: float, pinnable: float, said: bool
) -> None:
    roomy = card(*name, ram)
    choice = choose(file, replace(roomy, pinnable=int(pinnable * 1e9)))
    line = f"; ComfyUI pins at most {pinnable} GB of RAM here, so it may stream slower"
    assert (line in choice.why) == said, choice
    assert choose(file, roomy) == replace(choice, why=choice.why.replace(line, ""))
    assert choice.why.count("slower") <= 1


@pytest.mark.parametrize(
    ("ram", "taken", "said"),
    [
        (32, "int8", "too little RAM to pin it all, so it streams slower than the fp8 file would"),
        (18, "w4a8", "too little RAM to pin it all, so it streams slower"),  # nor would fp8 fit
    ],
)
def test_it_says_where_the_file_of_half_the_size_would_stream_faster(ram, taken, said) -> None:
    choice = choose(BF16, card(*RTX_4070, ram))
    assert choice.weight_dtype == taken and choice.why.endswith(f"; {said}"), choice


@pytest.mark.parametrize("file", [FP8, BF16], ids=lambda file: file.dtype)
def test_with_little_ram_it_takes_the_smallest_which_was_measured_fastest_there(file) -> None:
    """12 GB of VRAM, 16 GB of RAM: 0.7 s a step; the fp8 file read the disk, 1.8 s and more."""
    machine = card(*RTX_4070, 16)
    choice = choose(file, machine)
    assert (choice.weight_dtype, choice.preset) == ("bnb_nf4", "smallest")
    assert "bnb_nf4, preset smallest (10.6 GB): the RAM has room for nothing larger" in choice.why
    without = choose(file, replace(machine, packages=ALL - {"bitsandbytes"}))
    assert (without.weight_dtype, without.preset) == ("w4a8", "smallest")
    nothing = replace(machine, packages=ALL - {"bitsandbytes"}, cuda=(12, 8))
    assert (choose(file, nothing).weight_dtype in HOST_DTYPES, choose(file, nothing).preset) == (
        *(True, None),
    )
    loras = "; LoRAs added as it computes" if file is FP8 else ""
    assert choose(file, nothing).why.endswith(
        f"every step reads the disk{loras}; bnb_nf4 with the preset smallest (10.6 GB) would fit, but "
        "needs the package bitsandbytes: `pip install bitsandbytes` with the Python that runs "
        "ComfyUI, then restart it"
    )


def test_in_a_container_pinned_copies_count_since_comfyui_does_not_see_its_limit() -> None:
    outside = card(*RTX_4070, 40)
    inside = replace(outside, pins_blindly=True)
    bf16 = replace(BF16, bytes=60_000_000_000)  # too large for both
    assert choose(bf16, outside).weight_dtype == "int8"
    assert choose(bf16, inside).weight_dtype == "w4a8"  # int8 and its copy are 41 GB
    tight = replace(inside, ram_free=8 * GIB)
    assert "--disable-pinned-memory" in choose(FP8, tight).why


def test_without_dynamic_vram_eight_bits_that_the_card_holds_beat_streaming() -> None:
    amd = replace(bare("rocm", 64), vram_total=24 * GIB, vram_free=23 * GIB, name="RX 7900 XTX")
    assert choose(BF16, amd).weight_dtype == "bnb_int8"
    assert choose(BF16, replace(amd, vram_free=48 * GIB)).weight_dtype == "bf16"
    assert choose(BF16, replace(amd, vram_free=12 * GIB)).weight_dtype == "bf16"  # neither fits


# ----------------------------------------------------------------------------------- what runs
def test_w4a8_is_the_int4_of_all_cards_but_turing() -> None:
    shapes = [(3072, 3072)]
    assert [int4_for(c, shapes) for c in (None, (7, 5), (8, 0), (8, 9), (12, 0))] == [
        *("w4a8", "w4a4", "w4a8", "w4a8", "w4a8")
    ]
    assert int4_for((7, 5), [(10, 16)]) == "w4a8"  # w4a4 needs inputs by 64


@pytest.mark.parametrize(
    ("format", "machine", "said"),
    [
        ("int8", card("Tesla V100", (7, 0), 16, 64), "compute capability 7.5 (RTX 20) or newer"),
        ("w4a8", card("GTX 1080", (6, 1), 8, 64), "GTX 1080 has 6.1"),
        ("int8", bare("mps", 64), "does not run on mps; choose default, or bnb_nf4"),
        ("int8", bare("cpu", 64, packages=frozenset()), "requirements.txt"),
        ("bnb_nf4", bare("cpu", 64, packages=frozenset()), "pip install bitsandbytes"),
        ("bnb_nf4", bare("privateuseone", 64), "bitsandbytes does not run on privateuseone"),
    ],
)
def test_what_cannot_run_gets_a_sentence_with_a_remedy(format, machine, said) -> None:
    assert said in obstacle(format, machine)


@pytest.mark.parametrize(
    ("format", "machine", "said"),
    [
        ("int8", bare("cpu", 64), "slow: no kernels for cpu"),
        (
            "int8",
            card(*RTX_4070, 32, cuda=(12, 8)),
            "PyTorch for CUDA 13, and this one is for CUDA 12.8",
        ),
        ("bnb_nf4", bare("xpu", 64), "slow: no kernels for xpu"),
        ("int8", card(*RTX_4070, 32), ""),
        ("bnb_int8", bare("mps", 64), ""),
    ],
)
def test_what_runs_slowly_is_said_and_allowed(format, machine, said) -> None:
    assert obstacle(format, machine) == ""
    found = slowness(format, machine)
    assert said in found and bool(said) == bool(found)


# ------------------------------------------------------------------------- the table for people
ROOT = Path(__file__).resolve().parents[2]
LABEL = re.compile(r"[\u4e00-\u9fff]+（(\w+)）")  # as the Chinese editor shows a choice
KEPT = ("keep", "原样")
Makes = Callable[[int], Machine]  # a machine with so many GiB of RAM


def nvidia(name: str, capability: tuple[int, int], vram: int, **more) -> Makes:
    """A machine with this card."""
    return lambda ram: card(name, capability, vram, ram, **more)


def other(device: str, vram: int = 0) -> Makes:
    """A machine without NVIDIA's."""
    sizes = {"vram_total": vram * GIB, "vram_free": max(vram - 1, 0) * GIB}
    return lambda ram: replace(bare(device, ram), **sizes)


RTX = (("RTX 2060", (7, 5)), ("RTX 3060", (8, 6)), ("RTX 4070", (8, 9)), ("RTX 5070", (12, 0)))
GTX_1660, GTX_1080 = ("NVIDIA GeForce GTX 1660", (7, 5)), ("NVIDIA GeForce GTX 1080", (6, 1))
WITH_KERNELS = (*RTX, GTX_1660)
UP_TO_16 = (6, 8, 12, 16)
NEWER = {  # the first words of rows, in both languages, and their machines
    ("RTX 20 to 50, GTX 16,", "RTX 20 到 50、GTX 16，"): [
        nvidia(*each, vram) for each in WITH_KERNELS for vram in UP_TO_16
    ],
    ("RTX 30 to 50, 24 GB", "RTX 30 到 50，24 GB"): [nvidia(*each, 24) for each in RTX[1:]],
}
ROWS = {  # of the guide
    **NEWER,
    ("GTX 10, and any", "GTX 10，以及"): [
        nvidia(*GTX_1080, 8),
        *(nvidia(*each, 12, cuda=(12, 8)) for each in WITH_KERNELS),
    ],
    ("AMD, Intel", "AMD、Intel"): [other("rocm", 16), other("xpu", 16)],
    ("Mac", "Mac"): [other("mps")],
    ("No card", "没有显卡"): [other("cpu")],
}
SLOWER = [nvidia(*GTX_1080, vram) for vram in UP_TO_16]
SLOWER += [nvidia(*each, vram, cuda=(12, 8)) for each in WITH_KERNELS for vram in UP_TO_16]
SLOWER += [other(device, vram) for device in ("rocm", "xpu") for vram in (8, 12, 16)]
IN_README = {  # of the READMEs
    **NEWER,
    ("GTX 10, the above", "GTX 10、上面的显卡"): [*SLOWER, other("cpu")],
    ("Mac", "Mac"): [other("mps")],
}


def cell(file: File, machine: Machine) -> str:
    """What the table says of a choice: keep, or its name and preset.

    No card of the tables holds both models, so the guides may say of keep that LoRAs are added.
    """
    choice = choose(file, machine)
    assert not any(words in choice.why for words in ("step reads the disk", "system will swap"))
    name = "keep" if choice.weight_dtype == file.dtype else choice.weight_dtype
    return f"{name} {choice.preset}" if choice.preset else name


def said(line: str) -> list[str]:
    """The cells of a row behind its first."""
    plain = LABEL.sub(r"\1", line).replace("`", "").strip("|")
    cells = [part.strip() for part in plain.split("|")][1:]
    return ["keep" if part in KEPT else part for part in cells]


@pytest.mark.parametrize(
    ("packages", "format", "others"),
    [(ALL, "bnb_nf4", 4.5e9), (ALL - {"bitsandbytes"}, "w4a8", 3.6e9)],
)
def test_with_16_gb_of_ram_four_bit_has_room_beside_what_the_guides_say(
    packages, format, others
) -> None:
    little = card("RTX 4070", (8, 9), 12, 16, packages=packages)
    for used, expected in ((others - 1e8, format), (others + 1e8, "fp8_e4m3fn")):
        machine = replace(little, ram_free=int(16 * GIB - used))
        assert choose(FP8, machine).weight_dtype == expected


@pytest.mark.parametrize(
    ("name", "language", "rows"),
    [
        ("docs/formats.md", 0, ROWS),
        ("docs/zh/formats.md", 1, ROWS),
        ("README.md", 0, IN_README),
        ("README.zh.md", 1, IN_README),
    ],
)
def test_the_table_for_people_is_what_auto_takes(name: str, language: int, rows) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.count("64 GB") == 2)
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :]))
    assert len(table) == len(rows)
    for line, (words, machines) in zip(table, rows.items(), strict=True):
        assert line.startswith(f"| {words[language]}")
        for machine in machines:
            expected = [cell(f, machine(ram)) for f in (FP8, BF16) for ram in (64, 32, 16)]
            assert said(line) == expected, (line, machine(32).title)
