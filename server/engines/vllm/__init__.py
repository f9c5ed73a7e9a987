"""The engine for scale: vLLM generates, and its workers edit the states behind the tokens with the same `StateEditor`.

in this process
    engine.py       the engine's face: streams, and heads on every worker
    launch.py       vLLM as the settings ask for it
    outputs.py      vLLM's outputs, taken apart: from tokens to a choice's chunks
    sampling.py     a request in vLLM's terms, or why it cannot be one
in vLLM's processes, independent of this program's server
    worker.py       the worker class: installs control in whatever model runner vLLM made
    runners.py      one adapter for each of vLLM's model runners: which rows get a token
    row_control.py  which requests are controlled; a step's plan, edit and report
    unembedding.py  the editor's view of what vLLM computes logits with
    scheduler.py    the scheduler class: sends reports along with the tokens
    delivery.py     what of a report goes into which output
    validation.py   refuses bad control with a 400, where vLLM's own server is used
in both
    limits.py       what control cannot be had with
    wire.py         what travels in vLLM's `extra_args` and outputs
"""
