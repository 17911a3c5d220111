"""Qwen VRAM: Qwen-Image and Qwen-Image-Edit in less memory and less time."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES, start

WEB_DIRECTORY = "./js"


class QwenVRAMExtension(ComfyExtension):
    """Everything that the pack registers."""

    async def on_load(self) -> None:
        """Called once, before the nodes are registered."""
        await start()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return NODES


async def comfy_entrypoint() -> QwenVRAMExtension:
    """Called by ComfyUI when it loads the pack."""
    return QwenVRAMExtension()
