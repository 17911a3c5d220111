"""The attention backends that a model can be given: where each comes from, and how it is called.

All work on (batch, heads, tokens, width of a head). Packages are imported when a backend is asked
for; ComfyUI has imported most of them by then. ComfyUI's own functions for flash-attn and
SageAttention are not used: they fall back to PyTorch by themselves, which a self-test would not
see.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import comfy.model_management
import torch
from comfy.ldm.modules.attention import get_attention_function
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..core.attention import Attend

OWN, SDPA = "ComfyUI's own", "PyTorch SDPA"
AS_COMFYUI = (OWN, SDPA)  # get masks as they are; nothing looks at what they give if asked for
SUB_QUADRATIC, SPLIT = "sub-quadratic", "split"
HALVES = (torch.float16, torch.bfloat16)
EVERY = (*HALVES, torch.float32)
NEEDS_GPU = "it needs an NVIDIA or AMD graphics card"
TOO_OLD = "this card has compute capability {}.{}, it needs {}.{}"
NOT_INSTALLED = "not installed: {}"
DOES_NOT_LOAD = "installed, but it does not load ({}: {})"
Probe = Callable[[torch.device], str]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    attend: Attend  # takes the mask that it is given, or raises
    missing: Probe  # why it cannot run on a device, or ""
    takes_masks: bool = False  # any; keys that a mask hides from all queries are left out anyway
    quantised: float = 0.0  # relative L2 error that its own rounding may add; 0: exact
    dtypes: tuple[torch.dtype, ...] = HALVES
    of_process: bool = False  # is chosen by flags of the process, which other threads see

    def probe(self, device: torch.device | None = None) -> str:
        """Why it cannot run on the device, with what to install; "" if it may. Self-tests decide
        whether it works."""
        return self.missing(device or comfy.model_management.get_torch_device())


# ------------------------------------------------------------------------------ probes
def _here(device: torch.device) -> str:
    """Nothing is needed."""
    return ""


def _gpu(device: torch.device) -> str:
    return "" if device.type == "cuda" else NEEDS_GPU


def _capability(device: torch.device, least: tuple[int, int]) -> str:
    """Whether an NVIDIA card is new enough. AMD's numbers mean something else."""
    if gone := _gpu(device):
        return gone
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip or found >= least:
        return ""
    return TOO_OLD.format(*found, *least)


def _package(name: str, function: str, least: tuple[int, int], install: str) -> Probe:
    """A package with a function, on cards of at least a compute capability."""

    def missing(device: torch.device) -> str:
        """Why it cannot be used there, or ""."""
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            own = error.name is not None and name.startswith(error.name)
            return (
                NOT_INSTALLED.format(install)
                if own
                else DOES_NOT_LOAD.format(type(error).__name__, error)
            )
        except Exception as error:  # a library of another CUDA, a driver that is too old ...
            return DOES_NOT_LOAD.format(type(error).__name__, error)
        if not hasattr(module, function):
            return NOT_INSTALLED.format(install)
        return _capability(device, least)

    return missing


def _kitchen(device: torch.device) -> str:
    if get_attention_function("comfy_kitchen_int8", None) is None:
        return "ComfyUI offers it on NVIDIA cards from the RTX 20 series on"
    return _gpu(device)


# ------------------------------------------------------------------------------ PyTorch, ComfyUI
def _registered(name: str) -> Attend:
    """A function of ComfyUI."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """See `Backend.attend`."""
        more = {} if scale is None else {"scale": scale}
        function = get_attention_function(name)
        shapes = {"skip_reshape": True, "skip_output_reshape": True}
        return function(q, k, v, q.shape[1], mask=mask, **shapes, **more)

    return attend


def host_is_pytorch() -> bool:
    """Whether ComfyUI's own attention is PyTorch's: then the two are one function."""
    return get_attention_function("optimized") is get_attention_function("pytorch")


_KERNELS = threading.Lock()  # torch chooses kernels by flags of the process


def _sdpa(kernel: SDPBackend) -> Attend:
    """One kernel of PyTorch; raises RuntimeError where it cannot run."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """See `Backend.attend`."""
        with _KERNELS, sdpa_kernel([kernel]):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    return attend


# ------------------------------------------------------------------------------ packages
def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """(batch, heads, tokens, width) to (batch, tokens, heads, width), and back."""
    return [x.transpose(1, 2) for x in tensors]


def _no_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("it takes no mask")


def _flash(module: str) -> Attend:
    """flash-attn 2, 3 and 4 are called alike; the newer ones may add the sums of the softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """See `Backend.attend`."""
        _no_mask(mask)
        function = _import(module).flash_attn_func
        out = function(*_tokens_first(q, k, v), softmax_scale=scale, causal=False)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _sage_1(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Triton kernels: int8 scores, half precision values; also part of the package's version 2.

    The mean of the keys is taken off here, which changes no weight: with `smooth_k` version 1.0.6
    subtracts it from the caller's own tensor.
    """
    _no_mask(mask)
    package = _import("sageattention")
    function = getattr(package, "sageattn_qk_int8_pv_fp16_triton", package.sageattn)
    k = k - k.mean(dim=2, keepdim=True)
    with torch.cuda.device_of(q):  # where Triton starts kernels
        return function(q, k, v, tensor_layout="HND", sm_scale=scale, smooth_k=False)


def _sage_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The kernels that the package chooses for the card: int8 scores, fp16 or fp8 values."""
    _no_mask(mask)
    with torch.cuda.device_of(q):
        return _import("sageattention").sageattn(q, k, v, tensor_layout="HND", sm_scale=scale)


def _sage_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """fp4, for Blackwell. It knows no other scale than width ** -0.5."""
    _no_mask(mask)
    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    with torch.cuda.device_of(q):
        return _import("sageattn3").sageattn3_blackwell(q, k, v, is_causal=False)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    _no_mask(mask)
    function = _import("xformers.ops").memory_efficient_attention
    return function(*_tokens_first(q, k, v), scale=scale).transpose(1, 2)


# ------------------------------------------------------------------------------ the table
# int8 scores cost about 1.3 % (normal values, 4 sigma over 127 steps), fp8 values and weights 4 %,
# fp4 10 %: each backend may have three times what its formats cost.
INT8, FP8, FP4 = 0.04, 0.12, 0.3
WHEEL = "`pip install {}`; on Windows a wheel for your Python, torch and CUDA; none for macOS"
FLASH_2 = WHEEL.format("flash-attn --no-build-isolation")
FLASH_3 = "build it from the folder hopper of flash-attn's source; Linux, H100 or H200"
FLASH_4 = "`pip install --pre flash-attn-4`; Linux only"
SAGE_2 = "build version 2 from its source, or a wheel for your Python, torch and CUDA"
SAGE_1 = f"1.0.6 gives weight to keys that do not exist and fails the self-test; {SAGE_2}"
SAGE_3 = "build sageattn3 from the source of SageAttention; it needs an RTX 50 or newer"
XFORMERS = "`pip install xformers` in the version for your torch; none for macOS"
_2 = _package("sageattention", "sageattn_qk_int8_pv_fp16_cuda", (8, 0), SAGE_2)

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(OWN, _registered("optimized"), _here, True, dtypes=EVERY),
        Backend(SDPA, _registered("pytorch"), _here, True, dtypes=EVERY),
        Backend(
            "SDPA flash",
            _sdpa(SDPBackend.FLASH_ATTENTION),
            _here,
            dtypes=EVERY,
            of_process=True,
        ),
        Backend(
            "SDPA efficient",
            _sdpa(SDPBackend.EFFICIENT_ATTENTION),
            _gpu,
            True,
            dtypes=EVERY,
            of_process=True,
        ),
        Backend("SDPA cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION), _gpu, True, of_process=True),
        Backend(
            "flash-attn 2",
            _flash("flash_attn"),
            _package("flash_attn", "flash_attn_func", (8, 0), FLASH_2),
        ),
        Backend(
            "flash-attn 3",
            _flash("flash_attn_interface"),
            _package("flash_attn_interface", "flash_attn_func", (8, 0), FLASH_3),
        ),
        Backend(
            "flash-attn 4",
            _flash("flash_attn.cute"),
            _package("flash_attn.cute", "flash_attn_func", (8, 0), FLASH_4),
        ),
        Backend(
            "xFormers",
            _xformers,
            _package("xformers.ops", "memory_efficient_attention", (5, 0), XFORMERS),
            dtypes=EVERY,
        ),
        Backend(
            "SageAttention 1",
            _sage_1,
            _package("sageattention", "sageattn", (8, 0), SAGE_1),
            quantised=INT8,
        ),
        Backend("SageAttention 2", _sage_2, _2, quantised=FP8),
        Backend(
            "SageAttention 3",
            _sage_3,
            _package("sageattn3", "sageattn3_blackwell", (10, 0), SAGE_3),
            quantised=FP4,
        ),
        Backend(
            "comfy-kitchen int8",
            _registered("comfy_kitchen_int8"),
            _kitchen,
            True,
            quantised=FP8,
        ),
        Backend(SUB_QUADRATIC, _registered("sub_quad"), _here, True, dtypes=EVERY),
        Backend(SPLIT, _registered("split"), _here, True, dtypes=EVERY),
    )
}
