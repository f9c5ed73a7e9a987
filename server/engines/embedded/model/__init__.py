"""A language model as the engine runs it: rows of many texts at once, ending at the state before the LM head.

loader.py      a model with its tokenizer, from wherever server/engines/checkpoint finds it
takeover/      what it does, shown to be computed right, before anything is served
runner.py      what the engine calls: forward, LM head, key-value cache
body.py        the layers: transformers' modules (attention.py, experts.py, steady.py) or native ones (llama.py)
layout.py      what one step computes, and what each row may see
kv_cache.py    keys and values in pages; pages.py says whose
lm_head.py     logits of states
graphs.py      recorded decode steps, on a GPU
"""
