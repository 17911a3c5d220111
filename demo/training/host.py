"""What training takes from ComfyUI, which can be imported only once its arguments are parsed."""

# ruff: noqa: E402, F401
from __future__ import annotations

import os
import sys

import torch

from ..environment import ROOT

sys.path.insert(0, os.environ["COMFYUI_PATH"])  # before our own folder, which has nodes too
sys.path.append(str(ROOT))  # for core, whatever package the demo belongs to
import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args

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
