"""llama.cpp through llama-cpp-python's bindings of its C API: rows of a batch decoded together, as its server does.

The high-level `Llama` class runs one text at a time, so it could not show a batch.
"""

from __future__ import annotations

from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]

_PREFILL_TOKENS = 512


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._is_on_gpu = options["device"] == "cuda" and bool(llama_cpp.llama_supports_gpu_offload())
        model_params.n_gpu_layers = 999 if self._is_on_gpu else 0
        self._model = llama_cpp.llama_model_load_from_file(options["gguf"].encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        self._rows = options["max_batch_size"]
        params.n_seq_max = self._rows
        params.n_ctx = self._rows * options["max_len"]
        params.n_batch = params.n_ubatch = self._num_batch = max(_PREFILL_TOKENS, self._rows)
        params.n_threads = params.n_threads_batch = options["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params) if self._model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {options['gguf']}; the log says why")
        self._batch = llama_cpp.llama_batch_init(self._num_batch, 0, 1)
        self._threads = options["threads"]

    def facts(self) -> dict[str, Any]:
        flags = llama_cpp.llama_print_system_info().decode()
        return {"device": "cuda" if self._is_on_gpu else "cpu", "threads": self._threads, "system_info": flags}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """One random stream for all rows, at temperature 1 without filters."""
        del objectives
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        sampler = llama_cpp.llama_sampler_init_dist(seed % 2**32)
        try:
            tokens = [0] * len(prompts)
            self._prefill(sampler, prompts, tokens)
            num_tokens = len(prompts)
            for step in range(new_tokens - 1):
                for row, token in enumerate(tokens):
                    self._put(row, token, row, len(prompts[row]) + step, is_sampled=True)
                self._decode(len(tokens))
                tokens = [llama_cpp.llama_sampler_sample(sampler, self._context, row) for row in range(len(tokens))]
                num_tokens += len(tokens)
        finally:
            llama_cpp.llama_sampler_free(sampler)
        return {"num_tokens": num_tokens}

    def gpu_peak_bytes(self) -> int | None:
        """llama.cpp does not tell."""
        return None

    def _prefill(self, sampler: Any, prompts: list[list[int]], tokens: list[int]) -> None:
        """Compute the prompts, cut wherever a batch is full, and draw the first token of each row into `tokens`."""
        work = [
            (row, position, token, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(work), self._num_batch):
            part = work[start : start + self._num_batch]
            for index, (row, position, token, is_last) in enumerate(part):
                self._put(index, token, row, position, is_sampled=is_last)
            self._decode(len(part))
            for index, (row, _, _, is_last) in enumerate(part):
                if is_last:
                    tokens[row] = llama_cpp.llama_sampler_sample(sampler, self._context, index)

    def _put(self, index: int, token: int, row: int, position: int, *, is_sampled: bool) -> None:
        batch = self._batch
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = int(is_sampled)

    def _decode(self, num_tokens: int) -> None:
        self._batch.n_tokens = num_tokens
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode: {code}; the log says why")
