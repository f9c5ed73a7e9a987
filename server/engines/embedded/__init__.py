"""The engine in this process: torch, continuous batching, a loop in a thread of its own.

engine.py      async face; owns the loop thread
core.py        one step: schedule, forward, edit, sample, emit
scheduler.py   which rows a step holds; with shares.py, pace.py and prefix_cache.py
sequence.py    one choice of one request, from waiting to finished; candidates.py where several compete for it
sampler.py     tokens from logits
model/         a transformers model over flattened rows, its pages of keys and values, its native layers
"""
