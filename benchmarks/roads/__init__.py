"""Every road to a head of the same aim, side by side: what each asks for, what it takes, and how well its head steers.

`python -m benchmarks.roads HEAD` makes a head by each road, evaluates them all at equal divergence on held-out prompts,
and compares them with the shipped head of that name. Enter at `command.Roads`.
"""

PROGRAM = "python -m benchmarks.roads"
COMMAND = "benchmarks.roads.command:Roads"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
