"""The doctor in the real executor, and its judgement of processes that are not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.tests.graphs import node, preview

GPU = "NVIDIA GeForce RTX 3060"
READ = {
    "PYTORCH_CUDA_ALLOC_CONF": "",
    "max_split_size": -1,
    "garbage_collection_threshold": 0.0,
    "expandable_segments": False,
    "roundup_power2_divisions": {"1": 0, "2": 0},
}


@pytest.fixture
def part(host: Any) -> Iterator[Any]:
    """nodes.allocator; the settings file is removed afterwards."""
    yield host.part("nodes.allocator")
    (host.base / "user" / "default" / "comfy.settings.json").unlink(missing_ok=True)


@pytest.fixture
def seen(part: Any) -> Any:
    """A process with the native allocator on a GPU, without dynamic VRAM."""
    core = part.allocator
    return part.observe()._replace(
        machine=core.Machine("cuda", "Linux"),
        device=GPU,
        backend="native",
        text="",
        variable="",
        dynamic_vram=False,
        read=READ,
        fraction=1.0,
        sizes=(("cuda:0", 3 * 10**9, 2 * 10**9, 5 * 10**8), ("cuda:1", 0, 0, 0)),
        why="",
    )


def choose(host: Any, **settings: Any) -> None:
    """Write the settings file."""
    path = host.base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"QwenVRAM.Allocator.{k}": v for k, v in settings.items()}))


def states(part: Any, seen: Any) -> dict[str, str]:
    """The state of every option."""
    return {v.name: v.state for v in part.allocator_doctor.diagnose(seen).verdicts}


def text(part: Any, seen: Any) -> str:
    """The whole report."""
    return part.allocator_doctor.text_of(part.allocator_doctor.diagnose(seen))


# ------------------------------------------------------------------------------- this very process
def test_it_runs_alone_and_says_what_cannot_be_measured_without_a_gpu(host: Any, part: Any) -> None:
    graph = {"doctor": node("QwenVRAMAllocator", apply_now=False), **preview("doctor")}
    run = host.run(graph)
    status = run.status("doctor")
    assert run.outputs["doctor"] == [[status["report"]]]
    assert status["text"].startswith("CUDA is not used: ComfyUI runs with --cpu")
    assert not any(word in status["report"] for word in ("Backend:", "In effect", "Options"))
    assert status["options"]["backend"]["state"] == "ignored"
    assert "doctor" in host.run(graph).executed  # at every run: the process changes


def test_what_the_settings_say_is_told_and_what_makes_no_sense(host: Any, part: Any) -> None:
    choose(host, Backend="native", MaxSplitSizeMB=5)
    graph = {"doctor": node("QwenVRAMAllocator", apply_now=True)}
    status = host.run(graph).status("doctor")
    report = status["report"]
    assert " · 1 setting not understood · CUDA is not used" in status["text"]
    assert "Chosen in ComfyUI's settings now: backend:native." in report
    assert "MaxSplitSizeMB is 5, not a whole number of MB from 21 to 1000000" in report
    assert report.startswith("Nothing can be applied in the running process: ComfyUI runs with")
    (host.base / "user" / "default" / "comfy.settings.json").write_text("{")
    assert "comfy.settings.json cannot be read" in host.run(graph).status("doctor")["report"]


def test_with_several_users_the_settings_do_not_count(host, part, monkeypatch) -> None:
    choose(host, Backend="native")
    assert part.observe().choice == {"backend": "native"}
    monkeypatch.setattr(part.args, "multi_user", True)
    assert part.observe().choice == {}


def test_what_is_applied_is_read_back_from_pytorch(part: Any, seen: Any) -> None:
    """PyTorch's allocator keeps its options also without a GPU, where it is built for one."""
    read = part._options() if torch.backends.cuda.is_built() else None
    chosen = {"backend": "native", "max_split_size_mb": "128", "expandable_segments": "True"}
    seen = seen._replace(read=read, choice=chosen, why="this PyTorch does not tell its options")
    try:
        line = part.apply_choice(seen)
        if read is None:
            assert line.startswith("Nothing can be applied in the running process: this PyTorch")
            return
        assert "backend:native in use, max_split_size_mb:128 applied" in line
        assert part._options()["max_split_size"] == 128 << 20
        outside = part.Origin("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,foo:bar")
        assert "PyTorch refused" in part.apply_choice(seen._replace(origin=outside))
        outside = outside._replace(text="max_split_size_mb:64")
        line = part.apply_choice(seen._replace(origin=outside))
        assert "max_split_size_mb:128 not taken over" in line
        assert part._options()["max_split_size"] == 64 << 20
    finally:
        part._setter()("")


def test_nothing_is_applied_without_a_choice_or_with_the_drivers_allocator(part, seen) -> None:
    assert part.apply_choice(seen._replace(choice={})).startswith("Nothing to apply")
    driver = seen._replace(read=None, why="cudaMallocAsync keeps no account of its blocks")
    line = part.apply_choice(driver._replace(choice={"max_split_size_mb": "128"}))
    assert line.startswith("Nothing can be applied in the running process: cudaMallocAsync")


# --------------------------------------------------------------------------------- other processes
def test_cudamallocasync_ignores_the_options_and_tells_nothing(part: Any, seen: Any) -> None:
    seen = seen._replace(
        backend="cudaMallocAsync",
        text="max_split_size_mb:128,backend:cudaMallocAsync",
        read=None,
        sizes=None,
        why="cudaMallocAsync keeps no account of its blocks",
        dynamic_vram=True,
    )
    assert states(part, seen)["max_split_size_mb"] == "ignored"
    report = text(part, seen)
    assert "max_split_size_mb = 128: ignored (cudaMallocAsync ignores it); needs native." in report
    assert "not a minimum size" in report and "Measured: 128 changed nothing" in report
    assert "Fragmentation: not measurable (cudaMallocAsync keeps no account" in report
    assert "behind main.py: --cuda-malloc" in report and "export" not in report
    assert "Suggestion: Leave it alone." in report


def test_native_options_are_live_as_far_as_pytorch_has_them(part: Any, seen: Any) -> None:
    options = "max_split_size_mb:128,expandable_segments:True,garbage_collection_threshold:0.8"
    seen = seen._replace(text=options, variable="PYTORCH_CUDA_ALLOC_CONF")
    assert set(states(part, seen).values()) == {"live", "ignored", "not set"}
    read = {**READ, "max_split_size": 128 << 20, "expandable_segments": True}
    seen = seen._replace(read={**read, "garbage_collection_threshold": 0.8})
    expected = {
        "backend": "live",
        "max_split_size_mb": "live",
        "expandable_segments": "live",
        "garbage_collection_threshold": "ignored",
        "roundup_power2_divisions": "not set",
    }
    assert states(part, seen) == expected
    line = part.allocator_doctor.status_of(part.allocator_doctor.diagnose(seen))
    assert f"Backend: native, on {GPU}, dynamic VRAM off · max_split_size_mb: live · " in line
    dynamic = states(part, seen._replace(dynamic_vram=True))
    assert dynamic["expandable_segments"] == "harmful here"
    assert states(part, seen._replace(fraction=0.9))["garbage_collection_threshold"] == "live"
    unknown = states(part, seen._replace(fraction=None))["garbage_collection_threshold"]
    assert unknown == "not measurable"


@pytest.mark.parametrize(
    ("value", "inside", "state"),
    [
        ("2", 2, "harmful here"),
        ("8", 8, "live"),
        ("[1:1,>:4]", 4, "harmful here"),
        ("1", 1, "live"),
    ],
)
def test_coarse_steps_do_harm(part: Any, seen: Any, value: str, inside: int, state: str) -> None:
    read = {**READ, "roundup_power2_divisions": {"1": 1 if "[" in value else inside, "2": inside}}
    seen = seen._replace(text=f"roundup_power2_divisions:{value}", read=read)
    assert states(part, seen)["roundup_power2_divisions"] == state


def test_the_launcher_lines_give_the_same_start(part: Any, seen: Any) -> None:
    report = text(part, seen._replace(text="max_split_size_mb:128"))
    assert "of cuda:0: PyTorch holds 3.00 GB, 2.00 GB of it in use and 0.50 GB free" in report
    assert "of cuda:1: PyTorch holds 0.00 GB" in report
    assert 'Windows .bat: set "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128"' in report
    assert 'PowerShell: $env:PYTORCH_CUDA_ALLOC_CONF = "max_split_size_mb:128"' in report
    assert 'Linux, macOS: export PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:128"' in report
    assert "behind main.py: --disable-cuda-malloc" in report
    amd = seen._replace(machine=seen.machine._replace(built="hip"))
    assert "main.py" not in text(part, amd)


def test_findings_name_what_to_remove_and_where(part: Any, seen: Any) -> None:
    outside = part.Origin("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8")
    seen = seen._replace(
        text="garbage_collection_threshold:0.8,expandable_segments:True",
        origin=outside,
        read={**READ, "garbage_collection_threshold": 0.8, "expandable_segments": True},
        dynamic_vram=True,
        shadowed=("PYTORCH_ALLOC_CONF",),
        variable="PYTORCH_CUDA_ALLOC_CONF",
    )
    found = {f.id: f for f in part.allocator_doctor.diagnose(seen).findings}
    harm = found["allocator_ExpandableSegments"]
    assert harm.severity == "warning" and "slower on an H200 held down to 12 GB." in harm.text
    assert "in ComfyUI's settings, Qwen VRAM" in harm.action
    assert found["allocator_GarbageCollectionThreshold"].action == "Remove it in the launcher."
    assert (
        "PyTorch reads PYTORCH_CUDA_ALLOC_CONF and nothing else" in found["allocator_shadowed"].text
    )
    assert part.diagnosis().findings == ()


def test_what_was_merged_into_the_variable_in_use_is_not_called_without_effect(part, seen) -> None:
    doctor = part.allocator_doctor
    general = "PYTORCH_ALLOC_CONF"
    seen = seen._replace(
        origin=part.Origin(general, "backend:native,max_split_size_mb:64"),
        text="max_split_size_mb:64,roundup_power2_divisions:8",
        shadowed=(general,),
        variable="PYTORCH_CUDA_ALLOC_CONF",
    )
    ids = [finding.id for finding in doctor.diagnose(seen).findings]
    assert "allocator_shadowed" not in ids
    for text in ("max_split_size_mb:32", "nonsense"):
        lost = seen._replace(origin=part.Origin(general, text))
        assert "allocator_shadowed" in [f.id for f in doctor.diagnose(lost).findings]


def test_against_fragments_only_what_can_be_done_here_is_advised(part: Any, seen: Any) -> None:
    advice = part.allocator_doctor.against_fragments
    assert advice(seen) is None  # ComfyUI itself chose native: an old card, or --fast autotune
    assert advice(seen._replace(flag="native")).startswith("Leave out --disable-cuda-malloc and")
    outside = part.Origin("PYTORCH_ALLOC_CONF", "backend:native")
    assert "backend:native out of PYTORCH_ALLOC_CONF" in advice(seen._replace(origin=outside))
    assert "ComfyUI's settings" in advice(seen._replace(added={"backend": "native"}))
    amd = seen.machine._replace(built="hip")
    assert advice(seen._replace(machine=amd, flag="native")) is None
    assert advice(seen._replace(backend="cudaMallocAsync")) is None


def test_measurements_name_the_machine_and_are_told_once(part: Any, seen: Any) -> None:
    harmful = seen._replace(
        text="expandable_segments:True",
        read={**READ, "expandable_segments": True},
        dynamic_vram=True,
    )
    report = text(part, harmful)
    assert report.count("1.3 GB less") == 1 and "Measured on an H200" in report
    assert "no difference in one run of 60" in report
    driver = seen._replace(backend="cudaMallocAsync", read=None, why="no account")
    assert "on an H200 held down to 23.5 GiB, it was as fast as native in one run" in text(
        part, driver
    )


def test_a_variable_behind_another_is_not_read(part: Any) -> None:
    shadowed = part.allocator_doctor.shadowed
    names = {"PYTORCH_ALLOC_CONF": "", "PYTORCH_HIP_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": ""}
    assert shadowed(names, amd=False) == ("PYTORCH_ALLOC_CONF",)
    assert shadowed(names, amd=True) == ("PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    assert shadowed({"PYTORCH_ALLOC_CONF": ""}, amd=False) == ()
