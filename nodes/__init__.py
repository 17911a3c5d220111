"""The nodes: the only room that imports ComfyUI."""

import asyncio

from . import (
    allocator,
    attention,
    boundary,
    clear,
    colouring_page,
    conditioning,
    cute_animal,
    early_exit,
    environment,
    image_edit,
    kind_words,
    loaders,
    pins,
    prefill,
    provider,
    queue_time,
    reference_cache,
    report,
    routes,
    sampler,
    save_quantized,
    sticker_sheet,
    tiled_diffusion,
    tiled_edit,
    tiling,
    vae,
    warmup,
)

NODES = [*loaders.NODES, *conditioning.NODES, *image_edit.NODES, *prefill.NODES, *pins.NODES]
NODES += allocator.NODES
NODES += clear.NODES
NODES += warmup.NODES
NODES += report.NODES
NODES += sampler.NODES
NODES += vae.NODES
NODES += tiled_diffusion.NODES
NODES += tiled_edit.NODES
NODES += tiling.NODES
NODES += attention.NODES
NODES += reference_cache.NODES
NODES += early_exit.NODES
NODES += save_quantized.NODES
NODES += colouring_page.NODES
NODES += sticker_sheet.NODES
NODES += kind_words.NODES
NODES += cute_animal.NODES


async def start() -> None:
    """Register what is no node."""
    await provider.register()
    await boundary.register()
    asyncio.get_running_loop().run_in_executor(None, environment.read_sources)
    routes.register()
    pins.register()
    clear.register()
    queue_time.register()
    warmup.register()
    report.register()
