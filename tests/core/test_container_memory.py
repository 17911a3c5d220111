"""The limit of a container, by trees of files as Linux lays them out."""

from __future__ import annotations

from pathlib import Path

from pack.core.container_memory import Limit, limit


def write(folder: Path, **files: str) -> None:
    """A group's files; a double underscore stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_takes_the_tightest_group_around_the_process(tmp_path: Path) -> None:
    process, tree = tmp_path / "cgroup", tmp_path / "tree"
    process.write_text("0::/machine/job\n")
    write(tree, memory__stat="anon 9\n")  # the root has no limit of its own
    write(tree / "machine", memory__max="1000\n", memory__stat="anon 600\nshmem 50\nfile 300\n")
    write(tree / "machine" / "job", memory__max="max\n", memory__stat="anon 500\n")
    assert limit(process, tree) == Limit(1000, 650)
    write(tree / "machine" / "job", memory__max="800\n", memory__stat="anon 500\n")
    assert limit(process, tree) == Limit(800, 500)


def test_version_1_has_a_tree_for_memory_and_a_number_for_no_limit(tmp_path: Path) -> None:
    process, tree = tmp_path / "cgroup", tmp_path / "tree"
    process.write_text("9:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    root, own = tree / "memory", tree / "memory" / "docker" / "abc"
    write(root, memory__limit_in_bytes="9223372036854771712", memory__stat="rss 5\ntotal_rss 50\n")
    assert limit(process, tree) is None
    write(own, memory__limit_in_bytes="700", memory__stat="rss 5\ntotal_rss 60\ntotal_shmem 7\n")
    assert limit(process, tree) == Limit(700, 67)


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    process, tree = tmp_path / "cgroup", tmp_path / "tree"
    process.write_text("0::/not/mounted/here\n")
    write(tree, memory__max="4096", memory__stat="anon 96\n")
    assert limit(process, tree) == Limit(4096, 96)


def test_no_linux_no_limit(tmp_path: Path) -> None:
    assert limit(tmp_path / "nothing", tmp_path) is None
