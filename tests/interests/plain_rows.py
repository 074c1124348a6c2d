"""Values of a snapshot's row as Arrow's `to_pylist` gives them."""

import numpy as np


def plain(value):
    return (
        [plain(one) for one in value]
        if isinstance(value, list | np.ndarray)
        else getattr(value, "item", lambda: value)()
    )
