"""The techniques, in torch and the standard library; this room never imports ComfyUI."""
