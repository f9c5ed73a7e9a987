"""A backend `cpu` of Triton without a compiler, so that vLLM's Model Runner V2 runs where there is no GPU.

V2 refuses to start without Triton, and vLLM for CPUs takes Triton only with a backend of this name, which the package
of the registry lacks. Triton finds this one by the entry point beside it. Nothing is ever compiled: Triton's own
interpreter runs every kernel (TRITON_INTERPRET=1), slowly. `make test-vllm` has this folder's parent on PYTHONPATH.
"""
