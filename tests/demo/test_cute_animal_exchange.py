"""One node after another of Cute_Animal_For_Kids exchanged for ours: graphs, turns, the table."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from pack.benchmarks import cute_animal, cute_animal_graphs
from pack.benchmarks import cute_animal_exchange as exchange
from pack.benchmarks import cute_animal_exchange_table as of_table
from pack.tests.demo.test_cute_animal_benchmark import texts, whole


def graph_of(name: str, side: str = "B") -> dict[str, dict[str, Any]]:
    """A side of a pair, on the workflow's graph."""
    graph = cute_animal_graphs.with_words(whole(), "a cat", 7)
    return exchange.graph_of(name, side, graph, texts)


def ours_in(graph: dict[str, dict[str, Any]]) -> set[str]:
    """The nodes of this pack."""
    return {k for k, item in graph.items() if item["class_type"].startswith("QwenVRAM")}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sampler", {"sampler"}), ("encode", {"pos", "neg"}), ("decode", {"decode"}),
        ("loaders", {"unet", "clip", "vae"}), ("words", {"kind", "text"}),
        ("clear", {"decode clear"}),
    ],
)  # fmt: skip
def test_one_thing_is_exchanged_and_the_rest_is_stock(name: str, keys: set[str]) -> None:
    made, stock = graph_of(name), graph_of(name, "A")
    assert ours_in(made) == keys and not ours_in(stock)
    same = stock.keys() - keys - {"pos", "save"}
    assert {k: made[k] for k in same} == {k: stock[k] for k in same}
    assert stock == cute_animal_graphs.stock(
        cute_animal_graphs.with_words(whole(), "a cat", 7), texts
    )


def test_our_encoder_may_keep_what_it_encodes_and_stock_s_may_not() -> None:
    made = graph_of("encode")
    assert made["pos"]["inputs"]["text"] == "a cat, s, p" and made["pos"]["_meta"] == {}
    assert "keep_nothing" in graph_of("sampler")["pos"]["_meta"]["qwen_vram"]


def test_the_negative_which_never_changes_is_not_encoded_again_because_of_the_words() -> None:
    made = graph_of("words")
    assert made["pos"]["inputs"]["text"] == ["text", 0] and made["answer"]
    assert made["neg"] == graph_of("words", "A")["neg"]
    assert graph_of("all")["neg"]["inputs"]["text"] == ["text", 1]


def test_all_is_what_the_benchmark_calls_merged() -> None:
    graph = cute_animal_graphs.with_words(whole(), "a cat", 7)
    ours = cute_animal_graphs.graph_of("merged", graph, texts)
    made = graph_of("all")
    told = {k: (v["class_type"], v["inputs"]) for k, v in made.items()}
    assert told == {k: (v["class_type"], v["inputs"]) for k, v in ours.items()}


def test_clear_stands_in_the_way_of_the_picture() -> None:
    made = graph_of("clear")
    assert made["decode clear"]["inputs"]["value"] == ["decode", 0]
    assert made["save"]["inputs"]["images"] == ["decode clear", 0]


def test_the_sides_take_turns_unless_their_models_push_each_other_out() -> None:
    turns = exchange.turns("sampler", 2, 2)
    assert "".join(side for side, _ in turns) == "AABBAABB"
    assert [counts for _, counts in turns] == [False, *[True] * 7]
    turns = exchange.turns("loaders", 2, 2)
    assert "".join(side for side, _ in turns) == "AAAABBBB"
    assert [n for n, (_, counts) in enumerate(turns) if not counts] == [0, 4]
    assert turns == exchange.turns("encode", 2, 2) == exchange.turns("all", 2, 2)
    words = [exchange.words_of(number) for number in range(45)]
    assert len(set(words)) == 45  # all of them new


def picture(side: str, seconds: float, counts: bool = True, settled: bool = True) -> dict[str, Any]:
    """What one picture leaves: the sampler brought 4 GB of the transformer back."""
    at = {"models": {"QwenImage": [{"device": 16_000_000_000, "dynamic": True}]}, "pinned": 3}
    then = {**at, "models": {"QwenImage": [{"device": 20_000_000_000}]}, "reserved": 10**9}
    sampler = {
        "node": "19", "class": "QwenVRAMSampler" if side == "B" else "KSampler", "before": at,
        "after": then, "seconds": seconds - 1, "worker seconds": 0.5, "peak": 2 * 10**9,
        "calls": [
            {"call": "load_models_gpu", "seconds": 0.25}, {"call": "free_memory", "seconds": 0.1},
            {"call": "free_memory", "seconds": 0.1},
        ],
        "counts": {"pin_memory": [7, 70, 0.1]},
        "streamed": {"QwenImage": {"resident": [9, 5], "brought in": [2, 3 * 10**9],
                                   "streamed past": [1, 10**9]}},
    }  # fmt: skip
    return {
        "side": side, "seconds": seconds, "counts": counts, "settled": settled,
        "nodes": {"19": seconds - 0.5}, "classes": {"19": sampler["class"]},
        "probe": [sampler, {"node": "end", "class": "end", "before": then}],
    }  # fmt: skip


def test_the_table_has_medians_of_what_counts() -> None:
    rows = [
        picture("A", 99.0, counts=False), picture("A", 4.0), picture("B", 9.0, settled=False),
        picture("B", 5.0), picture("A", 4.2, settled=False), picture("A", 4.1),
    ]  # fmt: skip
    ram = {"N0": 30 * 10**9, "N1": 10**9}
    *table, _, last = of_table.table({"sampler": {"rows": rows, "RAM": ram}}).splitlines()
    assert last == "RAM of sampler by NUMA node: N0 30.00 GB, N1 1.00 GB."
    assert table[2] == (
        "| sampler | 3 / 2 | 4.10 / 7.00 | 4.05 / 5.00 | - / - | 3.55 / 4.50 | - / - | - / - |"
    )
    assert table[-1] == (
        "| sampler | B | sampler | 4.00 | 0.50 | QwenImage 16.00 to 20.00 | QwenImage 4.00 | 2.00 "
        "| 0.00 | 1.00 | free_memory 2, load_models_gpu 1, pin_memory 7 "
        "| 0.25 | 0.10 | 0.00 |"
    )


def test_without_two_of_a_side_in_a_row_all_pictures_are_compared() -> None:
    rows = [picture("A", 4.0, settled=False), picture("B", 9.0, settled=False)]
    assert {side: len(found) for side, found in of_table.compared(rows).items()} == {"A": 1, "B": 1}


def test_both_encodings_of_a_picture_count_as_one() -> None:
    node = picture("A", 4.0)["probe"][0]
    hit = {**node, "calls": [], "counts": {"pin_memory": [1, 2, 0.5]}, "streamed": {}, "peak": None}
    one = of_table.as_one([hit, node])
    assert (one["seconds"], one["worker seconds"], one["peak"]) == (6.0, 1.0, 2 * 10**9)
    assert one["counts"]["pin_memory"] == [8, 72, 0.6] and len(one["calls"]) == 3
    assert of_table.brought(one, "QwenImage") == 4 * 10**9


def test_the_ram_of_a_process_by_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numa_maps").write_text(
        "7f00 default anon=3 N0=2 N1=1 kernelpagesize_kB=4\n"
        "7f10 default huge anon=1 N0=1 kernelpagesize_kB=2048\n7f20 default\n"
    )
    monkeypatch.setattr(exchange, "Path", lambda path: tmp_path / Path(path).name)
    assert exchange.ram_by_node(1) == {"N0": 8192 + 2048 * 1024, "N1": 4096}
    monkeypatch.setattr(exchange, "Path", lambda path: tmp_path / "nowhere")
    assert exchange.ram_by_node(1) is None
    assert of_table.ram_text(None).startswith("not measurable")


def test_a_pair_that_is_in_the_file_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def pair(_: Namespace, name: str):
        begun.append(name)
        yield {**picture("A", 4.0), "exchange": name}
        if len(begun) == 2:
            raise KeyboardInterrupt
        yield {"end": True, "RAM": None}

    monkeypatch.setattr(exchange, "pair", pair)
    monkeypatch.setattr(cute_animal, "prepared", lambda *_: contextlib.nullcontext())
    options = Namespace(
        base=tmp_path, out=tmp_path / "out.json", rehearse=True, exchange=["all", "sampler"],
        card=24, args=[], seconds=60.0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        exchange.run(options)
    assert list(exchange.read(options.out)) == ["all"]
    assert not (tmp_path / "custom_nodes" / "exchange_probe").exists()
    exchange.run(options)
    exchange.run(options)
    assert begun == ["all", "sampler", "sampler"]
    options.rehearse, options.seconds, options.exchange = False, exchange.GUESS / 2, ["words"]
    with pytest.raises(SystemExit, match="pairs of other options"):
        exchange.run(options)
    options.out = tmp_path / "other.json"
    exchange.run(options)
    assert "no time for another pair" in capsys.readouterr().out and len(begun) == 3
