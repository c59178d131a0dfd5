"""Integer codes for rows of integer columns."""

import numpy as np

from gensparse.layout import Ints
from gensparse.patterns.base import Columns


def combine(columns: Columns) -> Ints:
    """One code [n] per row of integer columns, equal exactly for equal rows."""
    code, span = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        low = int(column.min(initial=0))
        width = int(column.max(initial=0)) - low + 1
        if span * width >= 1 << 62:
            code = np.unique(code, return_inverse=True)[1].reshape(-1)
            span = int(code.max(initial=0)) + 1
        code = code * width + (column - low)
        span *= width
    return code
