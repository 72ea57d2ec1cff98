"""Crops of photographs and what training varies about them, with their labels (protocol, 3.3)."""

from fastmetro.data.augmentation.cut import Cut, PackedCuts
from fastmetro.data.augmentation.draw import Draw, draw_samples
from fastmetro.data.augmentation.labels import augment_label
from fastmetro.data.augmentation.render import cut_image, finish_image, render_cuts

__all__ = [
    "Cut",
    "Draw",
    "PackedCuts",
    "augment_label",
    "cut_image",
    "draw_samples",
    "finish_image",
    "render_cuts",
]
