"""Looks into our own engine, each a script in a process of its own (server/bench/steps.py runs them)."""
