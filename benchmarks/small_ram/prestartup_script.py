"""Tell this process the truth about a cgroup: psutil only knows the whole machine.

QWEN_VRAM_CGROUP names a cgroup with a memory limit, and the process joins it here, before ComfyUI
asks for the RAM. Replacing a function of psutil is something that only a benchmark may do.
"""

import os
from pathlib import Path

import psutil

group = os.environ.get("QWEN_VRAM_CGROUP")
if group:
    folder = Path(group)
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    own = (folder / "memory.max").exists()
    limit = int((folder / ("memory.max" if own else "memory.limit_in_bytes")).read_text())
    names = ("anon", "shmem") if own else ("total_rss", "total_shmem")
    real = psutil.virtual_memory

    def virtual_memory():
        """Total and available bytes of the cgroup: its page cache can be had back."""
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in rows}
        free = max(0, limit - sum(stat.get(name, 0) for name in names))
        memory = real()
        return memory._replace(total=limit, available=min(free, memory.available))

    psutil.virtual_memory = virtual_memory
