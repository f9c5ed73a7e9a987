"""What each judge can tell: how often it puts the better of two written responses above the worse.

`python -m benchmarks.judges --out benchmarks/results/judges.json --into docs/quality.md` asks all judges of the shipped
heads about the pairs of pairs.jsonl, which differ in what an aim is about and in no word that a lexicon knows. Enter at
`command.Judges`.
"""

PROGRAM = "python -m benchmarks.judges"
COMMAND = "benchmarks.judges.command:Judges"
"""Imported by `server.cli.run` alone, once the number of threads is limited."""
