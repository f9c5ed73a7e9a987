"""A soak of the server: many requests of mixed kinds, and many faults. Enter at `run.measure`."""

PROGRAM = "python -m tests.soak"
COMMAND = "tests.soak.command:Soak"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
