"""Tagged images, the stages cut out of them, and the order they are seen in.

Read dataset.py first; then sources.py (where images come from), tags.py (which) and order.py
(when). A set that is encoded once is made by python -m data.encode.
"""

import sys
import warnings

if sys.argv[0] == "-m":
    import harness.interrupt  # noqa: F401  before torch is imported

    # Of python -m data.toyfaces, which is no command, and says so.
    warnings.filterwarnings("ignore", "'data", RuntimeWarning, "runpy")

from data.dataset import Dataset, Stream, batches, classes_of, open_dataset, rng

__all__ = ["Dataset", "Stream", "batches", "classes_of", "open_dataset", "rng"]
