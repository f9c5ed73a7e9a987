"""What the shipped heads do to text: studies of them against every rival, and the pages that show the figures.

`python -m benchmarks.quality HEAD` runs a study, `python -m benchmarks.quality.report` renders what heads' folders
hold, and `make_heads.sh` is everything behind the shipped heads, from nothing. Enter at `command.Quality`.
"""

PROGRAM = "python -m benchmarks.quality"
COMMAND = "benchmarks.quality.command:Quality"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
