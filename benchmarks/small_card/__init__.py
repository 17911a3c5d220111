"""A custom node for benchmarks: report the total memory of a smaller card (QWEN_VRAM_CARD_GIB).

Another process holds the rest of the real card; stock would count that process's memory as room
that it can win back. This replaces a function of torch, which only a benchmark may do.
"""

import os

import torch

NODE_CLASS_MAPPINGS = {}
card_gib = os.environ.get("QWEN_VRAM_CARD_GIB")
if card_gib:
    total = int(float(card_gib) * 2**30)
    real = torch.cuda.mem_get_info

    def mem_get_info(device=None):
        """Free and total bytes of the small card."""
        return min(real(device)[0], total), total

    torch.cuda.mem_get_info = mem_get_info
