"""The allocator string: parsed, checked, merged; and what PyTorch itself makes of it."""

from __future__ import annotations

import ast
import json
import os
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pack.core import allocator
from pack.core.allocator import (
    ASYNC,
    GENERAL_VARIABLE,
    HOSTS_OWN,
    MARKER,
    NATIVE,
    VARIABLE,
    Found,
    Machine,
    Origin,
)

NVIDIA = Machine("cuda", "Linux")
POWERS = [1, 2, 4, 8, 16, 32, 64]
DIVISIONS = st.sampled_from([0, *POWERS])
SIZES = st.lists(st.sampled_from([2**i for i in range(17)]), min_size=1, max_size=5, unique=True)
LISTS = st.builds(
    lambda sizes, steps, rest: "[" + ",".join([f"{s}:{steps}" for s in sorted(sizes)] + rest) + "]",
    SIZES,
    DIVISIONS,
    st.sampled_from([[], [">:8"]]),
)
VALUES = {
    "max_split_size_mb": st.integers(21, 10**6).map(str),
    "expandable_segments": st.sampled_from(["True", "False"]),
    "garbage_collection_threshold": st.integers(1, 99).map(lambda n: f"{n / 100:.2f}"),
    "roundup_power2_divisions": st.one_of(st.sampled_from(POWERS).map(str), LISTS),
}
# What people and future versions of PyTorch may write, beside our own options.
NAMES = st.text(string.ascii_lowercase + "_", min_size=3, max_size=12).map(lambda n: f"x_{n}")
WORDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=8)
OPTIONS = st.fixed_dictionaries({}, optional=VALUES)
BACKENDS = st.sampled_from([{}, {"backend": NATIVE}, {"backend": ASYNC}])
CHOICES = st.builds(lambda b, o: {**b, **o}, BACKENDS, OPTIONS)
OUTSIDE = st.builds(
    lambda b, o, x: {**b, **o, **x}, BACKENDS, OPTIONS, st.dictionaries(NAMES, WORDS, max_size=3)
)


def found(text: str | None = None, general: str | None = None, **given_: object) -> Found:
    """A start on NVIDIA, after ComfyUI's cuda_malloc has appended its own backend."""
    variables = {} if general is None else {GENERAL_VARIABLE: general}
    flag = given_.pop("flag", "")
    added = given_.pop("host_added", flag != NATIVE)
    variables |= given_.pop("variables", {})
    if text is not None or added:
        own = [HOSTS_OWN] if added else []
        variables[VARIABLE] = ",".join([*([] if text is None else [text]), *own])
    return Found(variables, added, flag, given_.pop("machine", NVIDIA))


# ------------------------------------------------------------------------------------- the string
@given(OUTSIDE)
def test_what_is_written_is_read_again(entries: dict[str, str]) -> None:
    assert allocator.parse(allocator.to_text(entries)) == entries
    spaced = allocator.to_text(entries).replace(",", " ,\n ").replace(":", " : ")
    assert allocator.parse(spaced) == entries


@given(st.text(alphabet="ab:,[]>1 ", max_size=20))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    try:
        entries = allocator.parse(text)
    except ValueError as error:
        assert "option with a value" in str(error)
    else:
        assert allocator.parse(allocator.to_text(entries)) == entries


@pytest.mark.parametrize("text", ["a", "a:", ":b", "a:b,,c:d", "a:[1:2", "a:b]", "a:b:c"])
def test_what_is_no_list_of_options_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="option with a value"):
        allocator.parse(text)


def test_two_backends_are_refused_and_the_same_twice_is_not() -> None:
    with pytest.raises(ValueError, match="two backends"):
        allocator.parse(f"backend:native,{HOSTS_OWN}")
    assert allocator.parse(f"{HOSTS_OWN},{HOSTS_OWN}") == {"backend": ASYNC}


@pytest.fixture(scope="module")
def torch_reads() -> Iterator[object]:
    """PyTorch's own parser; what it had read before is read again at the end."""
    yield torch._C._accelerator_setAllocatorSettings
    torch._C._accelerator_setAllocatorSettings("")


@given(OPTIONS)
@example({"roundup_power2_divisions": "[256:1,512:2,1024:4,>:8]"})
def test_pytorch_takes_every_value_that_we_call_valid(torch_reads, entries) -> None:
    assert all(allocator.is_valid(name, value) for name, value in entries.items())
    torch_reads(allocator.to_text(entries))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_split_size_mb", "19"),
        ("max_split_size_mb", "99999999999999999999999"),
        ("expandable_segments", "true"),
        ("garbage_collection_threshold", "1.0"),
        ("garbage_collection_threshold", "0.0"),
        ("roundup_power2_divisions", "3"),
        ("roundup_power2_divisions", "[3:1]"),
    ],
)
def test_what_pytorch_refuses_is_not_valid(torch_reads, name, value) -> None:
    with pytest.raises((ValueError, IndexError)):
        torch_reads(f"{name}:{value}")
    assert not allocator.is_valid(name, value)


@given(st.sampled_from(list(allocator.OPTIONS)), st.text(max_size=20))
@example("backend", "native,foo:bar")
@example("max_split_size_mb", "128\nLD_PRELOAD=x")
@example("max_split_size_mb", "１２８")
@example("roundup_power2_divisions", "[256:1],foo:[1]")
@example("roundup_power2_divisions", "[>:8]")
@example("roundup_power2_divisions", "[512:1,256:1]")
def test_no_valid_value_brings_another_option(name: str, value: str) -> None:
    if allocator.is_valid(name, value):
        assert allocator.parse(f"{name}:{value}") == {name: value}


@pytest.mark.parametrize(
    "value", ["[>:8]", "[>:8,256:1]", "[512:1,256:1]", "[]", "[256:3]", "0", "128"]
)
def test_lists_of_divisions_have_sizes_in_order(value: str) -> None:
    assert not allocator.is_valid("roundup_power2_divisions", value)


# ------------------------------------------------------------------------ what torch is built for
@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("__version__ = '2.8.0a0+nv25.08'\ncuda: Optional[str] = '13.0'\nhip = None\n", "cuda"),
        ("__version__ = '2.9.1'\ncuda = '12.8'\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0.1'\nrocm = '7'\n", "hip"),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = None\nhip = None", ""),
        ("", ""),
    ],
)
def test_the_version_file_says_what_torch_is_built_for(text: str, built: str) -> None:
    assert allocator.built_for(text) == built


def test_the_version_file_of_this_torch_is_understood() -> None:
    text = Path(torch.version.__file__).read_text(encoding="utf-8")
    is_built = "cuda" if torch.version.cuda else "hip" if torch.version.hip else ""
    assert allocator.built_for(text) == is_built


# --------------------------------------------------------------------------------- the settings
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from([f"QwenVRAM.Allocator.{o.setting}" for o in allocator.OPTIONS.values()])
        | st.text(max_size=9).map(lambda t: f"QwenVRAM.Allocator.{t}")
        | st.text(max_size=9),
        JSON,
    )
)
def test_whatever_the_settings_hold_only_valid_options_come_out(settings) -> None:
    choice, problems = allocator.choice_of(settings)
    assert all(allocator.is_valid(name, value) for name, value in choice.items())
    assert all("\n" not in problem and len(problem) < 300 for problem in problems)
    assert not allocator.choice_of({})[0]


def test_the_choices_of_the_dialog_are_understood() -> None:
    settings = {
        "Comfy.Locale": "zh",
        "QwenVRAM.Allocator.RoundupPower2Divisions": " [256:1, 512:2, >:8] ",
        "QwenVRAM.Allocator.GarbageCollectionThreshold": 0.85,
        "QwenVRAM.Allocator.ExpandableSegments": "on",
        "QwenVRAM.Allocator.MaxSplitSizeMB": 128.0,
        "QwenVRAM.Allocator.Backend": "native",
    }
    text = "backend:native,max_split_size_mb:128,expandable_segments:True,garbage_collection_threshold:0.85,roundup_power2_divisions:[256:1,512:2,>:8]"
    choice, problems = allocator.choice_of(settings)
    assert (allocator.to_text(choice), problems) == (text, [])
    usual = {"Backend": "leave as it is", "ExpandableSegments": "leave as it is"}
    usual |= {"MaxSplitSizeMB": 0, "GarbageCollectionThreshold": 0, "RoundupPower2Divisions": ""}
    assert allocator.choice_of({f"QwenVRAM.Allocator.{k}": v for k, v in usual.items()}) == ({}, [])


def test_a_value_that_makes_no_sense_is_named_with_what_would(tmp_path: Path) -> None:
    choice, problems = allocator.choice_of(
        {"QwenVRAM.Allocator.MaxSplitSizeMB": 20, "QwenVRAM.Allocator.Future": 1}
    )
    assert choice == {}
    assert problems == [
        "QwenVRAM.Allocator.MaxSplitSizeMB is 20, not a whole number of MB from 21 to 1000000",
        "'QwenVRAM.Allocator.Future' is not known to this version",
    ]


def test_a_settings_file_that_is_a_pipe_or_a_folder_does_not_hang(tmp_path: Path) -> None:
    assert allocator.read_settings(str(tmp_path)) == ({}, "it is no file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert allocator.read_settings(str(tmp_path / "pipe")) == ({}, "it is no file")
    assert allocator.read_settings(str(tmp_path / "none")) == ({}, "")


# -------------------------------------------------------------------------------------- merging
@given(CHOICES, OUTSIDE, st.sampled_from(["", NATIVE, ASYNC]), st.booleans())
def test_merging_keeps_all_that_was_set_outside(choice, outside, flag, general) -> None:
    text = allocator.to_text(outside)
    start = found(**{"general" if general else "text": text}, flag=flag)
    made = allocator.plan(choice, start)
    assert made.origin == Origin(GENERAL_VARIABLE if general else VARIABLE, text)
    if made.backend is None:  # nothing of the choice counts: as ComfyUI alone would have it
        assert made.text == start.variables.get(VARIABLE)
        return
    result = allocator.parse(made.text or "")
    kept = {name: value for name, value in result.items() if name in outside}
    assert kept == outside
    assert all(
        choice[name] == value
        for name, value in result.items()
        if name not in outside and name != "backend"
    )
    assert result.get("backend", NATIVE) == made.backend
    assert made.backend == (flag or outside.get("backend") or choice.get("backend") or ASYNC)
    if made.backend == ASYNC:
        assert not set(result) & set(VALUES) - set(outside)


@given(CHOICES, OUTSIDE)
def test_a_restart_in_place_starts_from_what_was_set_outside(choice, outside) -> None:
    """ComfyUI-Manager starts the same process anew: it inherits what we and ComfyUI had set."""
    text = allocator.to_text(outside)
    first = allocator.plan(choice, found(text))
    inherited = {MARKER: allocator.marker_of(first)}
    again = found(first.text, variables=inherited)
    assert allocator.plan(choice, again)[:4] == first[:4]
    # Without a choice it is what ComfyUI alone makes, and our options are gone.
    assert allocator.plan({}, again).text == f"{text},{HOSTS_OWN}"


def test_what_is_inherited_without_this_pack_is_still_one_backend() -> None:
    """After the pack was removed ComfyUI appends its own behind what we left."""
    made = allocator.plan({"backend": NATIVE, "max_split_size_mb": "128"}, found())
    assert made.text == "max_split_size_mb:128" and made.backend == NATIVE
    assert allocator.parse(f"{made.text},{HOSTS_OWN}")["backend"] == ASYNC


@given(st.text(max_size=40))
@example("[]")
@example('["","",null,[],[]]')
@example('["","",null,{"a":{}},[]]')
@example('["PATH","",null,{},[]]')
def test_a_marker_of_somebody_else_is_not_believed(text: str) -> None:
    assert allocator.read_marker({MARKER: text}) is None


def test_an_empty_choice_changes_nothing_at_all() -> None:
    for variables in ({}, {VARIABLE: ""}, {VARIABLE: "a"}, {VARIABLE: f",{HOSTS_OWN}"}):
        for added in (False, True):
            if added and HOSTS_OWN not in variables.get(VARIABLE, ""):
                continue
            made = allocator.plan({}, Found(variables, added, "", NVIDIA))
            assert made.text == variables.get(VARIABLE) and made.backend is None


@pytest.mark.parametrize(
    ("choice", "start", "text", "note"),
    [
        ({"backend": NATIVE}, found(), None, None),
        ({"backend": ASYNC}, found(host_added=False), HOSTS_OWN, None),
        ({"backend": NATIVE}, found(flag=ASYNC), HOSTS_OWN, "the command line says so"),
        ({"backend": ASYNC}, found(flag=NATIVE), None, "the command line says so"),
        ({"backend": NATIVE}, found(HOSTS_OWN), f"{HOSTS_OWN},{HOSTS_OWN}", f"{VARIABLE} was set outside"),
        ({"max_split_size_mb": "64"}, found(), HOSTS_OWN, "cudaMallocAsync ignores it"),
        ({"max_split_size_mb": "64"}, found("backend:native"), "backend:native,max_split_size_mb:64", None),
        ({"max_split_size_mb": "64"}, found("backend:native", flag=ASYNC), f"backend:native,{HOSTS_OWN}", "differ"),
        ({"max_split_size_mb": "64"}, found("nonsense"), f"nonsense,{HOSTS_OWN}", "not an option with a value"),
        ({"max_split_size_mb": "64"}, found(machine=Machine("", "Linux"), host_added=False), None, "not built for"),
        ({"max_split_size_mb": "64"}, found(machine=NVIDIA._replace(cpu=True)), HOSTS_OWN, "--cpu"),
        ({"backend": NATIVE, "expandable_segments": "True"}, found(machine=NVIDIA._replace(system="Windows")), None, "Linux only"),
        ({"backend": ASYNC}, found(machine=Machine("hip", "Linux"), host_added=False), None, "for NVIDIA"),
        ({"max_split_size_mb": "64"}, found(machine=Machine("hip", "Linux"), host_added=False), "max_split_size_mb:64", None),
    ],
)  # fmt: skip
def test_who_decides(choice, start, text, note) -> None:
    made = allocator.plan(choice, start)
    assert made.text == text
    assert (note is None) == (not made.notes) and (note or "") in " ".join(made.notes)
    assert "\n" not in allocator.log_line(made, [])


def test_one_line_says_what_was_done_and_what_not() -> None:
    made = allocator.plan(
        {"backend": NATIVE, "max_split_size_mb": "64"}, found("max_split_size_mb:32")
    )
    line = allocator.log_line(made, ["a problem"])
    assert line.startswith(f"Memory allocator: {VARIABLE}=max_split_size_mb:32, backend native, by")
    assert "Not applied: max_split_size_mb stays 32" in line and line.endswith("; a problem.")
    assert allocator.log_line(allocator.plan({}, found()), []) == ""


def test_the_module_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(allocator.__file__).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    assert json.loads(allocator.marker_of(allocator.plan({}, found())))[2] == HOSTS_OWN
