"""The nodes: the only room that imports ComfyUI."""

from . import conditioning, loaders

NODES = [*loaders.NODES, *conditioning.NODES]
