"""Looks into our own engine, each a script in a process of its own (benchmarks/speed/steps.py runs them)."""
