"""A custom node for benchmarks: a machine with less RAM; see prestartup_script.py.

QWEN_VRAM_PINNED_GIB in the environment makes ComfyUI pin as little as there, with all of the RAM.
"""

import os

import comfy.model_management

NODE_CLASS_MAPPINGS = {}
pinned_gib = os.environ.get("QWEN_VRAM_PINNED_GIB")
if pinned_gib:
    comfy.model_management.MAX_PINNED_MEMORY = int(float(pinned_gib) * 2**30)
