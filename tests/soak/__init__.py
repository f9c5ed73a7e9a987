"""A soak of the server: many requests of mixed kinds, and many faults. Enter at `run.measure`."""
