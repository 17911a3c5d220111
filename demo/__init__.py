"""Runs the pack in a real ComfyUI on tiny checkpoints, and sets up what that needs."""
