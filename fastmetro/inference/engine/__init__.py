"""The inference engine: a trained network folded, fused and captured."""

from fastmetro.inference.engine.engine import Engine, compile
from fastmetro.inference.engine.report import EngineReport, Fold

__all__ = ["Engine", "EngineReport", "Fold", "compile"]
