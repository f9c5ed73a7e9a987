"""The engine for scale: vLLM generates, and its workers edit the states behind the tokens with the same `StateEditor`.

in this process
    engine.py       the engine's face: AsyncLLM, streams, heads on every worker
    choices.py      one choice of a request: from vLLM's tokens to chunks
    sampling.py     a request in vLLM's terms, or why it cannot be one
    model_files.py  what is known of a model without loading its weights
in vLLM's processes, independent of this program's server
    worker.py       the worker class: installs control in whatever model runner vLLM made
    runners.py      one adapter for each of vLLM's model runners: which rows get a token
    row_control.py  which requests are controlled; a step's plan, edit and report
    unembedding.py  the editor's view of what vLLM computes logits with
    scheduler.py    sends what the edits did along with the tokens
    validation.py   refuses bad control with a 400, where vLLM's own server is used
between them
    wire.py         what travels in vLLM's `extra_args` and outputs
"""
