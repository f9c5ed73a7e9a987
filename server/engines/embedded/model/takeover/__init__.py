"""How a loaded model becomes one that this engine runs: known, shown to be computed right, and packed.

takeover.py  in which order
facts.py     what each layer's attention does, asked of the model
rotation.py  up to which length its rotary angles are those of a position alone
stand_in.py  the same model with short windows
proof.py     transformers' own forward, and this engine's steps held to it layer by layer
packing.py   its linear maps in their fastest form
"""
