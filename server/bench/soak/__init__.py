"""`recontrol bench --soak N`: many requests of mixed kinds and many faults against a real server. Enter at `run.py`."""
