"""Measures the pack against stock ComfyUI on the same work, side by side in one run."""
