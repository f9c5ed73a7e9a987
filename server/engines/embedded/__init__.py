"""The engine in this process: torch, continuous batching, a loop in a thread of its own.

engine.py      async face; owns the loop thread
core.py        one step: schedule, forward, edit, sample, emit
scheduler.py   which rows a step holds; slots
sequence.py    one choice of one request, from waiting to finished
runner.py      a transformers model over flattened rows
attention.py   slot-based key-value cache and attention over it
sampler.py     tokens from logits
detokenizer.py text from tokens; stop strings
loader.py      models from folders, hubs and the default's package
"""
