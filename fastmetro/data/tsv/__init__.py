"""The published data format: TSV files of images and labels, tied together by a YAML file."""

from fastmetro.data.tsv.build import build_data
from fastmetro.data.tsv.check import check_data
from fastmetro.data.tsv.files import TsvFile, TsvWriter
from fastmetro.data.tsv.rows import BadRow, Label, decode_image, parse_label
from fastmetro.data.tsv.source import Row, TsvSource

__all__ = [
    "BadRow",
    "Label",
    "Row",
    "TsvFile",
    "TsvSource",
    "TsvWriter",
    "build_data",
    "check_data",
    "decode_image",
    "parse_label",
]
