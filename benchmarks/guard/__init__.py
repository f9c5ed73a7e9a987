"""What a guardrail does to texts, and how well it finds what it is there for, on the real model.

The same prompts are answered without a guardrail and under each way to act where a bound breaks. A list of words that
the head was not trained on says which texts hold a toxic span, and where. Enter at `study.measure`.
"""

PROGRAM = "python -m benchmarks.guard"
COMMAND = "benchmarks.guard.command:Guard"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
