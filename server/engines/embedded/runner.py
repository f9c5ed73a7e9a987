"""A transformers model run over flattened rows, ending at the state after its final norm.

Any causal language model whose attention goes through transformers' AttentionInterface will do: the edit needs only
the post-norm state and the LM head. `ModelRunner.create` proves both on the model at hand before it packs the weights,
and refuses a model for which this engine's numbers differ from the model's own. Knows nothing of requests or control.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.engines.embedded.attention import KVCache, Segment, StepLayout, register_attention
from server.errors import ModelLoadError
from value_models.linear import PackedLinear

_PROBE_LENGTH = 12
_PROBE_STRIDE = 7919
_ALLOWED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


@dataclass(slots=True, frozen=True)
class DecodeRow:
    """The newest token of a decoding sequence; row b of a step lives in slot b."""

    position: int
    token_id: int


class LMHead:
    """Logits of post-norm states: `finish(project(h))`.

    `project` is linear (so that the logits of h + s * d are project(h) + s * project(d)) and carries no bias;
    `finish` adds what is not linear in h: a bias, and for some models a soft cap.
    """

    def __init__(self, linear: nn.Linear, config: Any) -> None:
        self._linear = PackedLinear(linear.weight)
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
        return PackedLinear(self._linear(eye_DD))


class ModelRunner:
    """Owns the weights and the key-value cache. Used from one thread only."""

    def __init__(self, backbone: nn.Module, lm_head: LMHead, kv: KVCache, device: torch.device) -> None:
        self.lm_head = lm_head
        self.kv = kv
        self.device = device
        self._backbone = backbone

    @classmethod
    def create(cls, model: Any, *, num_slots: int, max_len: int) -> ModelRunner:
        """Take over a loaded causal language model; it must not be used by anyone else afterwards.

        Raises ModelLoadError when the model cannot be run exactly.
        """
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ModelLoadError(f"{type(model).__name__} has no LM head to edit in front of; a causal model is needed")
        backbone = model.get_decoder()
        config = model.config.get_text_config()
        probe = torch.arange(1, _PROBE_LENGTH + 1, device=model.device) * _PROBE_STRIDE % config.vocab_size
        with torch.inference_mode():
            reference_TV = model(probe[None], use_cache=False).logits[0].float()
            lm_head = LMHead(linear, config)
            backbone.set_attn_implementation(register_attention())
            runner = cls(backbone, lm_head, KVCache(num_slots, max_len), model.device)
            runner._prove(probe.tolist(), reference_TV, type(model).__name__)
            _pack_linears(backbone)
            runner.kv.clear(0, _PROBE_LENGTH)
        return runner

    @torch.inference_mode()
    def forward(self, decode: list[DecodeRow], segments: list[Segment]) -> Tensor:
        """Post-norm states [T, D] in the model's dtype: a row for each decode row, then for each segment token."""
        longest = max([row.position + 1 for row in decode] + [segment.end for segment in segments])
        self.kv.reserve(longest)
        token_ids = [row.token_id for row in decode]
        positions = [row.position for row in decode]
        for segment in segments:
            token_ids += segment.token_ids
            positions += range(segment.start, segment.end)
        inputs_2T = torch.tensor([token_ids, positions], device=self.device)
        layout = StepLayout(
            kv=self.kv,
            decode_positions_B=inputs_2T[1, : len(decode)],
            segments=segments,
            max_decode_len=max((row.position + 1 for row in decode), default=0),
        )
        output = self._backbone(input_ids=inputs_2T[:1], position_ids=inputs_2T[1:], use_cache=False, step=layout)
        return output.last_hidden_state[0]

    def _prove(self, probe: list[int], reference_TV: Tensor, model_name: str) -> None:
        """Prefill, then decode, must give the model's own logits."""
        try:
            prefill_TD = self.forward([], [Segment(0, 0, probe[:-1])])
            decode_1D = self.forward([DecodeRow(len(probe) - 1, probe[-1])], [])
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


def _pack_linears(model: nn.Module) -> None:
    """Replace every linear layer below `model` in place. Weights shared with an embedding stay there unpacked."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, PackedLinear(child.weight, child.bias))
        elif isinstance(child, Conv1D):
            setattr(model, name, PackedLinear(child.weight.t(), child.bias))
        else:
            _pack_linears(child)
