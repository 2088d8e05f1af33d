"""Tagged images, the stages cut out of them, and the order they are seen in.

Read dataset.py first; then sources.py (where images come from) and tags.py (which of them). A set
that is encoded once is made by python -m data.encode.
"""

import sys

if sys.argv[0] == "-m":
    import harness.interrupt  # noqa: F401  before torch is imported

from data.dataset import Dataset, Stream, batches, classes_of, open_dataset, rng

__all__ = ["Dataset", "Stream", "batches", "classes_of", "open_dataset", "rng"]
