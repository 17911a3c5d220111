"""Bytecode in a folder of its own is where Python looks for it."""

from __future__ import annotations

import py_compile
import subprocess
import sys
from pathlib import Path

from pack.demo.__main__ import link_bytecode


def test_what_is_compiled_already_is_not_compiled_again(tmp_path: Path) -> None:
    source = tmp_path / "modules" / "inside" / "compiled_before.py"
    source.parent.mkdir(parents=True)
    source.write_text("found = __spec__.cached")
    compiled = source.parent / "__pycache__" / f"compiled_before.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(source), cfile=str(compiled), doraise=True)
    folder = tmp_path / "bytecode"
    for _ in range(2):  # the second time it is all there
        link_bytecode(tmp_path / "modules", folder)
    told = f"import sys; sys.path.insert(0, {str(source.parent)!r}); import compiled_before as c"
    command = [sys.executable, "-S", "-E", "-X", f"pycache_prefix={folder}", "-v"]
    done = subprocess.run(
        [*command, "-c", f"{told}; print(c.found)"], capture_output=True, text=True
    )
    linked = Path(done.stdout.strip())
    assert linked.is_relative_to(folder) and linked.samefile(compiled)
    assert f"# {linked} matches {source}" in done.stderr
