"""What callers can do to pinned control, field by field, on the real model.

Every field of a request is sent at a value that is meant to take pinned control back, to many prompts, and the pinned
head's value of the texts is compared with that of pinning alone. Enter at `study.measure`.
"""

PROGRAM = "python -m benchmarks.pinned"
COMMAND = "benchmarks.pinned.command:Pinned"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
