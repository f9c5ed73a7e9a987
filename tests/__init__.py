"""The tests. Where there is no GPU, Triton's interpreter runs the kernels of server/kernels/gpu.

Triton is told so before anything imports it, which transformers' models do. In vLLM's environment `make` decides.
"""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and not importlib.util.find_spec("vllm"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
