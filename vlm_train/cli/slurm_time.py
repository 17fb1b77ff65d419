"""Times as SLURM writes them."""

from __future__ import annotations

import re

ALLOWED = "MINUTES, H:MM:SS or D-HH:MM:SS"
"""For messages; the rarer forms are read too."""

# SLURM would take 1:75:00 for 2:15:00, and loses count of days beyond four digits
_BELOW_60, _BELOW_24 = "[0-5]?[0-9]", "(?:[01]?[0-9]|2[0-3])"
_FORMS = (
    rf"(?P<minutes>[0-9]{{1,7}})(?::(?P<seconds>{_BELOW_60}))?",
    rf"(?P<hours>[0-9]{{1,5}}):(?P<minutes>{_BELOW_60}):(?P<seconds>{_BELOW_60})",
    rf"(?P<days>[0-9]{{1,4}})-(?P<hours>{_BELOW_24})(?::(?P<minutes>{_BELOW_60})(?::(?P<seconds>{_BELOW_60}))?)?",
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def seconds_of(text: str) -> int | None:
    """Seconds of `M`, `M:SS`, `H:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`; None where it is none of these. 0 is no
    limit for SLURM."""
    for form in _FORMS:
        if found := re.fullmatch(form, text):
            return sum(int(value or 0) * _SECONDS[unit] for unit, value in found.groupdict().items())
    return None
