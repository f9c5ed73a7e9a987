"""What runs inside each peer's process: `main` speaks with the benchmark, the other files each drive one engine.

A peer has a Python of its own, so these files import nothing of this project; `recontrol_engine` alone does.
"""
