"""After a prefill no prompt of the list needs an encoder, in our node or in stock's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.tests.graphs import CLIP, encode, keeping_nothing, loader, node, preview
from pack.tests.host import RunError


def prefill(prompts: str = "", file: str = "", cache: str = "memory and disk") -> dict[str, Any]:
    """A graph that encodes a list and nothing else."""
    inputs = {"clip": ["clip", 0], "prompts": prompts, "file": file, "cache": cache}
    return {"clip": loader("TextEncoder", CLIP), "p": node("QwenVRAMPrefill", **inputs)}


def both(text: str) -> dict[str, Any]:
    """Our encode node and the stock one."""
    stock = node("CLIPTextEncode", clip=["clip", 0], text=text)
    return {
        "clip": loader("TextEncoder", CLIP),
        "ours": encode(text),
        "stock": stock,
        **preview("ours", "stock"),
    }


def test_ours_and_stock_find_what_was_filled_in_after_a_restart(fresh: Any) -> None:
    run = fresh.run(prefill("a red fox\n# no prompt\n\na blue bird\na red fox"))
    status = run.status("p")
    assert status["text"].startswith("2 prompts: 0 known, 2 encoded in ")
    assert status["text"].endswith(" s, 0 not stored")
    assert run.outputs["p"] == [[2]] and status["encoded"] == 2
    fresh.restart()
    for text in ("a red fox", "a blue bird"):
        used = fresh.run(both(text))
        assert used.status("ours")["result"] == "hit"
        assert "stock" not in used.executed and "clip" not in used.executed
    fresh.restart()
    other = fresh.run(both("a green dog"))
    assert {"ours", "stock", "clip"} <= set(other.executed)


def test_what_it_stores_is_what_stock_encodes(fresh: Any) -> None:
    expected = fresh.run(keeping_nothing(both("a red fox"))).outputs["stock"][0][0]
    fresh.restart()
    fresh.run(prefill("a red fox"))
    fresh.restart()
    run = fresh.run(both("a red fox"))
    found = run.outputs["ours"][0][0]
    assert found[0][0].equal(expected[0][0]) and found[0][1].keys() == expected[0][1].keys()


def test_a_known_list_needs_neither_encoder_nor_loader(fresh: Any) -> None:
    fresh.run(both("a red fox"))
    fresh.restart()
    run = fresh.run(prefill("a red fox\na blue bird"))
    assert run.status("p")["known"] == 1 and "clip" in run.executed
    again = fresh.run(prefill("a red fox\na blue bird"))  # it runs at every time it is queued
    assert again.status("p")["text"] == "2 prompts: 2 known, 0 encoded in 0.0 s, 0 not stored"
    fresh.restart()
    assert "clip" not in fresh.run(prefill("a red fox\na blue bird")).executed
    fresh.store.clear()
    assert fresh.run(prefill("a red fox\na blue bird")).status("p")["encoded"] == 2


def test_files_are_read_from_the_input_folder_or_by_path(fresh: Any, tmp_path: Path) -> None:
    (fresh.base / "input" / "list.csv").write_text("n;prompt;negative\n1;a fox; \n2;a bird;bad\n")
    fresh.run(prefill("one", file="list.csv"))
    path = tmp_path / "more.txt"
    path.write_text("a fox\nbad\n\none\ntwo\n")
    status = fresh.run(prefill(file=f'"{path}"')).status("p")
    assert (status["known"], status["encoded"]) == (3, 1)
    assert fresh.run(both("")).status("ours")["result"] == "hit"  # the empty negative prompt


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.txt", r"Cannot read none\.txt \(No such file.*input folder"),
        ("../secret.txt", "Invalid file path"),
        ("picture.png", r"picture\.png is no list of prompts"),
    ],
)
def test_a_file_that_cannot_be_read_gets_a_sentence(fresh: Any, file: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        fresh.run(prefill(file=file))


def test_memory_only_leaves_nothing_on_disk(fresh: Any) -> None:
    assert fresh.run(prefill("a red fox", cache="memory")).status("p")["encoded"] == 1
    assert not fresh.store_directory.exists()
    fresh.executor.reset()
    assert fresh.run(both("a red fox")).status("ours")["tier"] == "memory"


def test_a_list_that_is_larger_than_the_cache_is_told(fresh: Any) -> None:
    fresh.run(prefill("one"))
    usual, size = fresh.store.disk_bytes, fresh.store.usage().disk.bytes
    fresh.store.configure(disk_bytes=4 * size)
    try:
        status = fresh.run(prefill("\n".join(map(str, range(9))))).status("p")
    finally:
        fresh.store.configure(disk_bytes=usual)
    assert status["encoded"] == 9 and status["not_stored"] >= 5
    assert "(the cache is full: raise its bound in ComfyUI's settings" in status["text"]


def test_nothing_is_encoded_that_may_not_be_kept(fresh: Any) -> None:
    run = fresh.run(keeping_nothing(prefill("a red fox\na blue bird")))
    expected = "2 prompts: 0 known, 0 encoded in 0.0 s, 2 not stored (a test wants it fresh)"
    assert run.status("p")["text"] == expected and "clip" not in run.executed
    graph = prefill("a red fox")
    graph["random"] = node("TestRandomClip", clip=["clip", 0])
    graph["p"]["inputs"]["clip"] = ["random", 0]
    text = fresh.run(graph).status("p")["text"]
    assert text.endswith(
        "1 not stored (cannot be cached: TestRandomClip is random (random.random))"
    )


def test_it_stops_between_two_prompts_and_keeps_what_is_done(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = fresh.part("nodes.prefill")
    real = part.encoding.keep

    def keep_and_interrupt(*given: Any) -> str:
        fresh.nodes.interrupt_processing()
        return real(*given)

    monkeypatch.setattr(part.encoding, "keep", keep_and_interrupt)
    with pytest.raises(RunError):
        fresh.run(prefill("a red fox\na blue bird"))
    monkeypatch.undo()
    assert fresh.run(prefill("a red fox\na blue bird")).status("p")["known"] == 1


def test_the_bar_moves(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    utils = fresh.part("nodes.prefill").comfy.utils
    hook = lambda value, total, *_, **__: shown.append((value, total))  # noqa: E731
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", hook)
    fresh.run(prefill("a red fox\na blue bird"))
    assert shown[0] == (1, 2) and shown[-1] == (2, 2)


def test_an_encoder_that_is_none_gets_a_sentence(fresh: Any) -> None:
    graph = prefill("a red fox")
    graph["clip"] = node("TestNoClip")
    with pytest.raises(RunError, match=r"The clip input carries no text encoder"):
        fresh.run(graph)
