"""A custom node for benchmarks: a machine with less RAM; see prestartup_script.py."""

NODE_CLASS_MAPPINGS = {}
