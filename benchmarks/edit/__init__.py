"""The edit alone: how many operations it launches on a GPU, and how long they take. `python -m benchmarks.edit`."""
