"""A transformers model run over flattened rows, ending at the state after its final norm.

Any causal language model whose attention goes through transformers' AttentionInterface will do: the edit needs only
the post-norm state and the LM head. `ModelRunner.create` proves both on the model at hand before it packs the weights,
and refuses a model for which this engine's numbers differ from the model's own. Knows nothing of requests or control.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.engines.embedded.model.activations import compute_rows_alone
from server.engines.embedded.model.attention import DecodeRow, Segment, StepLayout, register_attention
from server.engines.embedded.model.graphs import DecodeGraphs, record_on_cuda
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.pages import NULL_PAGE, num_pages_for
from server.errors import ConfigurationError, ModelLoadError
from server.kernels.linear import Bits, can_run_natively, frozen_linear
from server.kernels.transfer import on_device
from value_models.linear import PackedLinear

_PROBE_LENGTH = 12
_PROBE_STRIDE = 7919
_ALLOWED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
# The null page, and one that holds the probe.
_PROBE_PAGES = NULL_PAGE + 2


class LMHead:
    """Logits of post-norm states: `finish(project(h))`.

    `project` is linear (so that the logits of h + s * d are project(h) + s * project(d)) and carries no bias;
    `finish` adds what is not linear in h: a bias, and for some models a soft cap.
    """

    def __init__(self, linear: nn.Linear, config: Any, *, bits: Bits = 16) -> None:
        self._linear = frozen_linear(linear.weight, bits=bits, out_dtype=torch.float32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._dtype, self._device = linear.weight.dtype, linear.weight.device

    @property
    def is_linear(self) -> bool:
        return self._softcap is None

    def project(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] any float dtype -> [M, V] float32."""
        logits_MV = self._linear(hidden_MD.to(self._dtype)).float()
        return logits_MV if self._scale == 1.0 else logits_MV * self._scale

    def finish(self, projected_MV: Tensor) -> Tensor:
        """[M, V] float32 -> logits [M, V] float32."""
        if self._bias is not None:
            projected_MV = projected_MV + self._bias
        if self._softcap is not None:
            projected_MV = self._softcap * torch.tanh(projected_MV / self._softcap)
        return projected_MV

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] any float dtype -> logits [M, V] float32."""
        return self.finish(self.project(hidden_MD))

    def logp_grads(self, hidden_MD: Tensor, token_ids_M: Tensor) -> Tensor:
        """Gradients [M, D] of tokens' log-probabilities (temperature 1) by the states, in closed form.

        For plain logits W h it is W[token] - E[W[v]], v ~ softmax(W h): the token's row less the expected row.
        """
        logits_MV = self.logits(hidden_MD)
        residual_MV = logits_MV.softmax(dim=-1).neg_()
        residual_MV.scatter_add_(1, token_ids_M[:, None], torch.ones_like(residual_MV[:, :1]))
        if self._softcap is not None:
            residual_MV *= 1 - (logits_MV / self._softcap).square()
        return self._transposed(residual_MV.to(self._dtype)) * self._scale

    @cached_property
    def _transposed(self) -> PackedLinear:
        """The map by W^T, made when rollouts first ask for it; the identity's product is W^T itself."""
        eye_DD = torch.eye(self._linear.in_features, dtype=self._dtype, device=self._device)
        return PackedLinear(self._linear(eye_DD).to(self._dtype))


class ModelRunner:
    """Owns the weights and the key-value cache. Used from one thread only."""

    def __init__(self, backbone: nn.Module, lm_head: LMHead, kv: KVCache, device: torch.device) -> None:
        self.lm_head = lm_head
        self.kv = kv
        self.device = device
        self.graphs: DecodeGraphs | None = None
        """Recorded decode steps, on a GPU."""
        self._backbone = backbone

    @classmethod
    def create(cls, model: Any, *, max_len: int, max_sequences: int, kv_bytes: int, bits: Bits = 16) -> ModelRunner:
        """Take over a loaded causal language model; it must not be used by anyone else afterwards.

        The key-value cache gets room for `max_sequences` of `max_len` tokens, but never more than `kv_bytes`. With
        fewer than 16 `bits` its linear maps are quantized, once the model has been proved as it is.

        Raises ModelLoadError when the model cannot be run exactly, ConfigurationError when not even one sequence of
        max_len fits, or weights cannot be quantized here.
        """
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ModelLoadError(f"{type(model).__name__} has no LM head to edit in front of; a causal model is needed")
        backbone = model.get_decoder()
        config = model.config.get_text_config()
        probe = torch.arange(1, _PROBE_LENGTH + 1, device=model.device) * _PROBE_STRIDE % config.vocab_size
        with torch.inference_mode():
            reference_TV = model(probe[None], use_cache=False).logits[0].float()
            is_fast = NativeLlama.can_run(backbone, config)
            if not is_fast:
                backbone.set_attn_implementation(register_attention())
            body = NativeLlama(backbone, config, max_len=max_len) if is_fast else backbone
            runner = cls(body, LMHead(linear, config), KVCache(_PROBE_PAGES), model.device)
            runner._prove(probe.tolist(), reference_TV, type(model).__name__)
            if bits != 16:
                _check_quantizable(backbone, linear, bits)
                runner.lm_head = LMHead(linear, config, bits=bits)
                if is_fast:
                    runner._backbone = NativeLlama(backbone, config, max_len=max_len, bits=bits)
            if is_fast:
                # The weights are in the native form now.
                del backbone.layers
            else:
                _pack_linears(backbone, bits)
                if model.device.type == "cpu":
                    compute_rows_alone(backbone)
            if model.device.type == "cuda":
                runner.graphs = DecodeGraphs(runner._run, record_on_cuda)
            runner.kv = KVCache(num_pages(runner.kv.bytes_per_page, max_len, max_sequences, kv_bytes))
        return runner

    @torch.inference_mode()
    def forward(self, decode: list[DecodeRow], segments: list[Segment]) -> Tensor:
        """Post-norm states [T, D] in the model's dtype: a row for each decode row, then for each segment token."""
        token_ids = [row.token_id for row in decode]
        for segment in segments:
            token_ids += segment.token_ids
        step = StepLayout.of(self.kv, decode, segments, self.device)
        token_ids_T = on_device(token_ids, self.device)
        if self.graphs is not None and not segments:
            return self.graphs.forward(token_ids_T, step)
        return self._run(token_ids_T, step)

    def _run(self, token_ids_T: Tensor, step: StepLayout) -> Tensor:
        output = self._backbone(
            input_ids=token_ids_T[None], position_ids=step.positions_T[None], use_cache=False, step=step
        )
        return output.last_hidden_state[0]

    def _prove(self, probe: list[int], reference_TV: Tensor, model_name: str) -> None:
        """Prefill, then decode, must give the model's own logits."""
        try:
            pages = [NULL_PAGE + 1]
            prefill_TD = self.forward([], [Segment(pages, 0, probe[:-1])])
            decode_1D = self.forward([DecodeRow(pages, len(probe) - 1, probe[-1])], [])
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(
                f"{model_name} cannot be served: its attention does not go through transformers' interface as this "
                f"engine needs ({error})"
            ) from error
        logits_TV = self.lm_head.logits(torch.cat([prefill_TD, decode_1D]))
        error_T = (logits_TV - reference_TV).norm(dim=-1) / reference_TV.norm(dim=-1)
        error, allowed = error_T.median().item(), _ALLOWED_ERROR[prefill_TD.dtype]
        if not error <= allowed:
            raise ModelLoadError(
                f"{model_name} cannot be served: the state before its LM head does not explain its logits "
                f"(relative error {error:.3g}, allowed {allowed:.3g})"
            )


def num_pages(bytes_per_page: int, max_len: int, max_sequences: int, kv_bytes: int) -> int:
    """Pages, the null page included. Raises ConfigurationError."""
    one = num_pages_for(max_len)
    wanted = max_sequences * one
    allowed = min(wanted, kv_bytes // bytes_per_page - 1)
    if allowed < one:
        raise ConfigurationError(
            f"kv_cache_gib: a sequence of {max_len} tokens takes {(one + 1) * bytes_per_page / 2**30:.3g} GiB of keys "
            f"and values; allow that, or set a smaller max_model_len"
        )
    return NULL_PAGE + 1 + allowed


def _check_quantizable(backbone: nn.Module, lm_head: nn.Linear, bits: Bits) -> None:
    for name, module in [*backbone.named_modules(), ("lm_head", lm_head)]:
        weight = _weight_of(module)
        if weight is not None and not can_run_natively(weight, bits=bits):
            raise ConfigurationError(
                f"quantization: {name} [{weight.shape[0]}, {weight.shape[1]}] in {weight.dtype} cannot be quantized "
                "here; that takes the native kernels (an x86 CPU with AVX2), dtype bfloat16, and inputs in multiples "
                "of 32"
            )


def _weight_of(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear map; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.weight
    return module.weight.t() if isinstance(module, Conv1D) else None


def _pack_linears(model: nn.Module, bits: Bits) -> None:
    """Replace every linear layer below `model` in place. Weights shared with an embedding stay there unpacked."""
    for name, child in list(model.named_children()):
        weight: Any = _weight_of(child)
        if weight is None:
            _pack_linears(child, bits)
        else:
            bias: Any = child.bias
            setattr(model, name, frozen_linear(weight, bias, bits=bits))
