"""A text encoder whose file has no vocabulary computes it, and encodes as with it written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pack.tests.graphs import CLIP, encode, loader, preview
from pack.tests.host import Host, RunError
from safetensors.torch import load_file, save_file

TABLE = "model.embed_tokens.weight"
COMPUTED = '{"vision_heads": 2, "vocabulary": "sign_codes"}'
TEXTS = ("a small blue bunny", "一只戴帽子的小熊", "🦊 ??", "")


@pytest.fixture
def files(fresh: Host) -> Iterator[Path]:
    """The folder with three encoders: bare, table (the same written out) and untold."""
    folder = fresh.models / "text_encoders"
    state = load_file(folder / CLIP)
    width = state.pop(TABLE).shape[1]
    table = fresh.part("core.sign_codes").sign_codes(width).to(torch.bfloat16)
    save_file(state, folder / "bare.safetensors", {"qwen_vram": COMPUTED})
    save_file(
        {**state, TABLE: table}, folder / "table.safetensors", {"qwen_vram": '{"vision_heads": 2}'}
    )
    save_file(state, folder / "untold.safetensors", {"qwen_vram": '{"vision_heads": 2}'})
    yield folder
    for name in ("bare", "table", "untold"):
        (folder / f"{name}.safetensors").unlink()


def encoded(host: Host, name: str, **options: str) -> tuple[list[torch.Tensor], dict]:
    """What an encoder makes of TEXTS, and what its loader showed."""
    keys = [f"e{i}" for i in range(len(TEXTS))]
    graph = {"clip": loader("TextEncoder", name, **options), **preview(*keys)}
    graph |= {key: encode(text, cache="off") for key, text in zip(keys, TEXTS, strict=True)}
    run = host.run(graph)
    return [run.outputs[key][0][0][0][0] for key in keys], run.status("clip")


@pytest.mark.parametrize("weight_dtype", ["default", "fp32", "fp8_e4m3fn"])
def test_a_file_without_a_vocabulary_encodes_as_with_it(fresh, files, weight_dtype) -> None:
    bare, shown = encoded(fresh, "bare.safetensors", weight_dtype=weight_dtype)
    table, shown_too = encoded(fresh, "table.safetensors", weight_dtype=weight_dtype)
    other, _ = encoded(fresh, CLIP, weight_dtype=weight_dtype)
    for one, same, another in zip(bare, table, other, strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, same)
        assert not torch.equal(one, another)
    assert [shown[k] for k in ("bytes", "dtype")] == [shown_too[k] for k in ("bytes", "dtype")]


def test_the_computed_vocabulary_has_the_dtype_of_the_file(fresh, files, monkeypatch) -> None:
    """With dynamic VRAM the host takes the tensors as they are, so what it is given counts."""
    architectures = fresh.part("nodes.architectures")
    given, load_sd = [], architectures.comfy.sd.CLIP.load_sd

    def watched(clip, sd):
        given.append(sd[TABLE])
        return load_sd(clip, sd)

    monkeypatch.setattr(architectures.comfy.sd.CLIP, "load_sd", watched)
    architectures.load_text_encoder(str(files / "bare.safetensors"), {})
    (table,) = given
    assert table.dtype == torch.bfloat16 and table.shape[0] == 152064
    assert set(table.unique().tolist()) == {-1, 1}


def test_fresh_weights_for_the_host_s_clones_have_it_too(fresh, files) -> None:
    architectures = fresh.part("nodes.architectures")
    clip = architectures.load_text_encoder(str(files / "bare.safetensors"), {})
    function, arguments = clip.patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in clip.patcher.model.state_dict().items())


def test_a_stored_prompt_of_such_a_file_is_found_again(fresh, files) -> None:
    graph = {"clip": loader("TextEncoder", "bare.safetensors"), "e": encode("x"), **preview("e")}
    first = fresh.run(graph)
    fresh.restart()
    again = fresh.run(graph)
    assert "clip" in first.executed and "clip" not in again.executed
    assert torch.equal(first.outputs["e"][0][0][0][0], again.outputs["e"][0][0][0][0])
    # Another way to compute the codes is another key: their source is part of it.
    assert "core/sign_codes.py" in fresh.part("nodes.environment").PACK_SOURCES


def test_a_file_that_does_not_say_how_gets_a_sentence(fresh, files) -> None:
    with pytest.raises(RunError, match=r"^untold\.safetensors lacks the vocabulary .*sign_codes"):
        encoded(fresh, "untold.safetensors")
