"""What training takes from ComfyUI, which can be imported only once its arguments are parsed."""

# ruff: noqa: E402, F401
from __future__ import annotations

import sys

import torch

from ..environment import ROOT, find_comfyui

comfyui = find_comfyui()
if comfyui is None:
    raise SystemExit("ComfyUI was not found: set COMFYUI_PATH to its folder.")
sys.path.insert(0, str(comfyui))  # before our own folder, which has nodes too
sys.path.append(str(ROOT))  # for core, whatever package the demo belongs to
import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args

if "comfy.model_management" not in sys.modules:  # then the device is settled already
    args.use_pytorch_cross_attention = True
    args.cpu = not torch.cuda.is_available()
import comfy.ops
from comfy import model_management
from comfy.latent_formats import Wan21
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel, QwenImageTransformerBlock
from comfy.ldm.wan import vae as wan
from comfy.text_encoders import llama, qwen_image, qwen_vl

from core.sign_codes import sign_codes

operations = comfy.ops.disable_weight_init
