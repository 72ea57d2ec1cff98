"""Which backend and configuration `auto` takes: by measurement, from a table per family of devices.

`table.py` reads, checks and writes the table, `choice.py` looks up a call, and `command.py`
(`python -m fastmetro_kernels.tune`) measures. Ops ask `ranking`; nothing is ever measured in a call.
"""

from fastmetro_kernels.tuning.choice import ENVIRONMENT, families, family_of, nearest, ranking, reset
from fastmetro_kernels.tuning.reader import TuningFileError
from fastmetro_kernels.tuning.table import Candidate, Family, Point

__all__ = [
    "ENVIRONMENT",
    "Candidate",
    "Family",
    "Point",
    "TuningFileError",
    "families",
    "family_of",
    "nearest",
    "ranking",
    "reset",
]
