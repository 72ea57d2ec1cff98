"""The FastMETRO networks, their backbones and their checkpoints."""

from fastmetro.models.backbones import BACKBONES, create_backbone
from fastmetro.models.config import CONFIGS, FastMETROConfig
from fastmetro.models.network import FastMETRO, create_model

__all__ = ["BACKBONES", "CONFIGS", "FastMETRO", "FastMETROConfig", "create_backbone", "create_model"]
