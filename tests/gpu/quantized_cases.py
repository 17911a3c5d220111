"""What test_quantized_patcher.py looks at, in a ComfyUI of its own, with dynamic VRAM or without.

Run with the folders of ComfyUI, of its models and of the pack, the kind of VRAM, and the device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADS, LAYERS = 48, 3  # 1536 wide: 255 M parameters
KEPT = 160 * 2**20  # bytes of the card that are left where weights have to be streamed
FORMATS = ("bnb_nf4", "bnb_int8", "int8", "w4a8", "fp8_e4m3fn")


def start(comfyui: Path, base: Path, pack: Path, dynamic: bool, device: str) -> Any:
    """ComfyUI as its main.py starts it, as far as memory goes; before torch is imported."""
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.disable_dynamic_vram = not dynamic
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init(simple_vram_headroom=None)
    from pack.tests.host import Host

    class CardHost(Host):
        """The host of the other tests, on the card."""

        @staticmethod
        def _configure(base: Path) -> None:
            Host._configure(base)
            args.cpu = device == "cpu"
            args.front_end_root = str(base)  # there is no package of it on a card for tests

    host = CardHost(comfyui, base, pack)
    import comfy.memory_management
    import comfy.model_patcher

    if dynamic:
        assert comfy_aimdo.control.init_devices([(0, 0)])
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return host


class Hog:
    """Holds the card's memory but for `KEPT` bytes."""

    def __enter__(self) -> None:
        import comfy.model_management as mm
        import torch

        mm.unload_all_models()
        mm.soft_empty_cache()
        self.held = None
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            self.held = torch.empty(free - KEPT, dtype=torch.uint8, device="cuda")

    def __exit__(self, *_: object) -> None:
        import comfy.model_management as mm

        self.held = None
        mm.soft_empty_cache()


def look_at(host: Any, plain: dict[str, Any], format: str, device: str) -> dict[str, Any]:
    """One format: resident and streamed, with a LoRA and without, evicted and loaded again."""
    import comfy.model_management as mm
    import torch
    from pack.tests.nodes.quantized_models import draw, error, lora_on, model_of, quantized_state

    state = quantized_state(host, plain, format, "balanced", device)
    model = model_of(host, plain, state, torch.bfloat16)
    bare = draw(host, model)
    patched = lora_on(host, model, "card.safetensors", 0.8)
    layers, place = patched.run_time_patches.layers.values(), patched.load_device
    seen: list[int] = []

    def watch(apply: Any, options: dict[str, Any]) -> Any:
        seen.append(sum(layer.resident_bytes(place) for layer in layers))
        return apply(options["input"], options["timestep"], **options["c"])

    patched.set_model_unet_function_wrapper(watch)
    with_lora = draw(host, patched)
    found: dict[str, Any] = {
        "kind": type(model).__name__,
        "bytes": model.model_size(),
        "resident": patched.loaded_size(),
        "finite": bool(bare.isfinite().all() and with_lora.isfinite().all()),
        "changed": error(with_lora, bare),
        "removed": torch.equal(draw(host, model), bare),
        "zero": torch.equal(draw(host, lora_on(host, model, "card.safetensors", 0.0)), bare),
        "again": torch.equal(draw(host, patched), with_lora),
    }
    found["factors"] = max(seen)
    found["factors between runs"] = sum(layer.resident_bytes(place) for layer in layers)
    plain_clone = patched.clone(disable_dynamic=True)
    found["not dynamic"] = torch.equal(draw(host, plain_clone), with_lora)
    found["kind of it"] = type(plain_clone).__name__
    del plain_clone
    with Hog():
        found["streamed"] = torch.equal(draw(host, model), bare)
        found["streamed_lora"] = torch.equal(draw(host, patched), with_lora)
        found["resident_streamed"] = patched.loaded_size()
        found["pinned"] = patched.pinned_memory_size() if patched.is_dynamic() else 0
    with torch.inference_mode(False):  # as the button that unloads models
        mm.unload_all_models()
    found["factors_after"] = sum(layer.resident_bytes(place) for layer in layers)
    found["loaded_after"] = patched.loaded_size()
    found["reloaded"] = torch.equal(draw(host, patched), with_lora)
    mm.unload_all_models()
    return found


def main() -> None:
    """Write what was found to found.json in the folder of the models."""
    comfyui, base, pack = map(Path, sys.argv[1:4])
    kind, device = sys.argv[4:6]
    host = start(comfyui, base, pack, kind == "dynamic", device)
    import comfy.memory_management as memory
    import torch
    from pack.demo import tiny_checkpoints
    from pack.tests.nodes.quantized_models import state_of, write_lora

    tiny_checkpoints.HEADS, tiny_checkpoints.LAYERS = HEADS, LAYERS
    name = "card.safetensors"
    dynamic, memory.aimdo_enabled = memory.aimdo_enabled, False  # else layers have no weights yet
    tiny_checkpoints.write_transformer(host.models / "diffusion_models" / name)
    memory.aimdo_enabled = dynamic
    plain = state_of(host, name)
    attention = [f"transformer_blocks.{i}.attn.to_{n}" for i in range(LAYERS) for n in "qkv"]
    width = HEADS * tiny_checkpoints.HEAD_DIM
    write_lora(host, name, dict.fromkeys(attention, (width, width)), rank=16, gain=1.0)
    with torch.inference_mode():
        found = {f: look_at(host, plain, f, device) for f in sys.argv[6:] or FORMATS}
    (base / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  the pack as `pack`

    main()
