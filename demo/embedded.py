"""The embedded model's files, in folders as ComfyUI wants them under `models`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("models")
TRANSFORMER = "diffusion_models/tiny_animals_edit.safetensors"
TEXT_ENCODER = "text_encoders/tiny_animals_text.safetensors"
VAE = "vae/tiny_animals_vae.safetensors"
CLASSIFIER = "animal_classifier.safetensors"
FILES = (TRANSFORMER, TEXT_ENCODER, VAE, CLASSIFIER)
