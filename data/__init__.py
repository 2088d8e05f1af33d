"""Tagged images, the stages cut out of them, and the order they are seen in. Read dataset.py first."""

from data.dataset import Dataset, Stream, batches, classes_of, open_dataset, rng

__all__ = ["Dataset", "Stream", "batches", "classes_of", "open_dataset", "rng"]
