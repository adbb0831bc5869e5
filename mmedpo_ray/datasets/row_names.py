"""How a row of a data set is called: by its own id, else by its position."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any
from uuid import UUID

from mmedpo_ray.io.text import storable

# Whole numbers below it are exact as floats.
_EXACT = 2**53


def given_name(given: Any) -> str | None:
    """A row's own id as part of a sample id, None where it has none.

    "~" is ours: it separates what we append.

    Text, bytes (UTF-8, else their hex digits), numbers (17, 17.0 and Decimal("17.00") are the same id) and
    UUIDs are ids; null, NaN, true and false, dates and anything nested are none.
    """
    if isinstance(given, bytes):
        try:
            given = given.decode()
        except UnicodeDecodeError:
            given = given.hex()
    if isinstance(given, int | float | Decimal | UUID) and not isinstance(given, bool):
        return _number_name(given)
    if not isinstance(given, str) or not given.strip():
        return None
    return storable(given).strip().replace("%", "%25").replace("~", "%7E")


def _number_name(given: float | Decimal | UUID) -> str | None:
    if isinstance(given, int | UUID):
        return str(given)
    if not math.isfinite(given):
        return None
    # pandas makes whole numbers floats where a column has gaps; large floats are no exact numbers.
    if given == int(given) and (isinstance(given, Decimal) or abs(given) < _EXACT):
        return str(int(given))
    return f"{given.normalize():f}" if isinstance(given, Decimal) else str(given)
