"""The nodes: the only room that imports ComfyUI."""

from . import conditioning, image_edit, loaders, pins, prefill, provider, queue_time, routes

NODES = [*loaders.NODES, *conditioning.NODES, *image_edit.NODES, *prefill.NODES, *pins.NODES]


async def start() -> None:
    """Register what is no node."""
    await provider.register()
    routes.register()
    pins.register()
    queue_time.register()
