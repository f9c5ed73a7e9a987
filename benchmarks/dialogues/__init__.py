"""Ten-turn dialogues that lead a model on, and what guards and control make of them over the turns.

Each dialogue's user says the same ten things whatever the model answers, and each answer goes into the next turn's
messages. Enter at `study.measure`.
"""

PROGRAM = "python -m benchmarks.dialogues"
COMMAND = "benchmarks.dialogues.command:Dialogues"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
