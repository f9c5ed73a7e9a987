"""The speed comparison: this server and its peers on the same model, prompts, precision and sampling, turn by turn.

Every program runs in a process of its own, and is frozen while another one is measured. Enter at `offline.measure`
(tokens a second, no HTTP) and `online.measure` (streams over HTTP at a rate).
"""

PROGRAM = "python -m benchmarks.speed"
COMMAND = "benchmarks.speed.command:Speed"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
