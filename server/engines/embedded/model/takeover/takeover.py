"""A loaded model taken over by this engine: known, shown to be computed right, and put into its fastest form.

What its layers do is asked of the model (facts.py). Then transformers' own forward, transformers' modules with this
engine's attention, and where the model is built for them the native layers, compute the same texts (proof.py); a model
with longer windows than these is shown with short ones (stand_in.py). What cannot be shown is not served. Knows nothing
of requests. Enter at `take_over`.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engines.embedded.model.attention import UnsupportedAttentionError, register_attention
from server.engines.embedded.model.body import Body
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepSlot, StepWatch
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.model.spans import Span
from server.engines.embedded.model.steady import Steady
from server.engines.embedded.model.takeover.facts import (
    FAILURES,
    CountsByCacheError,
    LayerFacts,
    ask,
    carrying_layer,
    check_positions,
    has_experts,
    one_line,
)
from server.engines.embedded.model.takeover.packing import check_quantizable, pack, weights_read
from server.engines.embedded.model.takeover.proof import LONGEST, PROOF_PAGES, Blocks, Difference, Follower, Reference
from server.engines.embedded.model.takeover.rotation import static_length
from server.engines.embedded.model.takeover.stand_in import short_sizes, short_spans
from server.errors import ModelLoadError
from server.kernels.linear import Bits

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class TakenOver:
    body: Body
    lm_head: LMHead
    bytes_per_page: int
    """Of keys and values, over all layers."""


def take_over(model: Any, *, max_len: int, bits: Bits = 16) -> TakenOver:
    """Raises ModelLoadError when the model cannot be run exactly, ConfigurationError when it cannot be quantized."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelLoadError(f"{type(model).__name__} has no LM head to edit in front of; a causal model is needed")
    try:
        return _Takeover(model, linear, max_len).run(bits)
    except UnsupportedAttentionError as error:
        raise ModelLoadError(f"{type(model).__name__} cannot be served: {error}") from error


class _Takeover:
    def __init__(self, model: Any, linear: nn.Linear, max_len: int) -> None:
        self._model, self._linear = model, linear
        self._backbone = _backbone(model)
        self._config = model.config.get_text_config()
        self._own_attention: str = self._backbone.config._attn_implementation
        positions = getattr(self._config, "max_position_embeddings", None) or LONGEST
        self._length = static_length(self._backbone, min(LONGEST, positions))
        """Of the longer text that the model is shown on."""
        self._max_len = max(max_len, self._length)
        if hasattr(self._backbone, "set_experts_implementation"):
            # Transformers' others ask for sizes in multiples of eight, for one thing.
            self._backbone.set_experts_implementation("eager")
        self._facts = ask(self._backbone, self._max_len)
        self._blocks = Blocks.of(self._backbone, self._facts)
        self._kv = KVCache(PROOF_PAGES)

    def run(self, bits: Bits) -> TakenOver:
        """The layers in their final form are shown too, unless they have fewer bits."""
        backbone = self._backbone
        # Of layers all of whose parts are known, nothing else needs to be asked.
        is_llamas = NativeLlama.can_run(backbone, self._config, self._facts)
        if not is_llamas:
            self._check_carries_nothing()
        sizes = short_sizes(self._facts, self._length // 2)
        with short_spans(self._model, sizes):
            shown = self._shown(sizes)
            backbone.set_attn_implementation(self._own_attention)
            reference = Reference.of(self._model, backbone, shown, self._length, watch_attention=is_llamas)
            head = self._lm_head(reference)
            follower = Follower(reference, self._linear.weight.dtype, has_experts=has_experts(backbone))
            body = (self._native(follower, shown, bits) if is_llamas else None) or self._general(follower, shown, bits)
        return TakenOver(
            replace(body, spans=_spans(self._facts)),
            head if bits == 16 else head.quantized(self._linear, bits),
            self._kv.bytes_per_page,
        )

    def _shown(self, sizes: Mapping[int, int]) -> Mapping[int, LayerFacts]:
        """The facts with short spans. Raises UnsupportedAttentionError where the masks did not follow."""
        if not sizes:
            return self._facts
        shown = ask(self._backbone, self._max_len)
        for index, fact in self._facts.items():
            span = fact.kind.span
            expected = Span(*(sizes.get(size, size) if size else None for size in (span.window, span.chunk)))
            if shown[index].kind.span != expected:
                raise UnsupportedAttentionError(
                    f"layer {index} sees {span.window or span.chunk} tokens, and cannot be shown right beyond them"
                )
        return shown

    def _native(self, follower: Follower, shown: Mapping[int, LayerFacts], bits: Bits) -> Body | None:
        """By the native layers, if they prove right."""
        if bits != 16:
            check_quantizable(self._backbone, self._linear, bits)
        native = NativeLlama(self._backbone, self._facts, max_len=self._max_len)
        difference = self._follow(follower, self._body(native.attending(shown), shown))
        if difference.is_too_large:
            _log.info("%s runs through transformers' modules, since natively %s", self._name, difference)
            return None
        if bits != 16:
            native = NativeLlama(self._backbone, self._facts, max_len=self._max_len, bits=bits)
        # The weights are in the native form now.
        del self._backbone.layers
        return self._body(native, self._facts)

    def _general(self, follower: Follower, shown: Mapping[int, LayerFacts], bits: Bits) -> Body:
        """By transformers' modules with this engine's attention, as they are and then with packed maps."""
        backbone = self._backbone
        backbone.set_attn_implementation(register_attention())
        with weights_read(backbone) as read:
            difference = self._follow(follower, self._body(backbone, shown))
        self._check(difference)
        check_positions(backbone, self._facts, self._max_len)
        backbone.set_attn_implementation(register_attention())
        if bits != 16:
            check_quantizable(backbone, self._linear, bits)
        return self._packed(follower, shown, bits, read)

    def _packed(
        self, follower: Follower, shown: Mapping[int, LayerFacts], bits: Bits, read: Collection[nn.Module]
    ) -> Body:
        """By transformers' modules, whose products give a row the same bits in every batch."""
        pack(self._backbone, bits, but=read)
        body = self._body(self._backbone, shown)
        if self._model.device.type == "cpu":
            body = replace(body, steady=Steady())
        difference = self._follow(follower, body)
        if bits == 16:
            self._check(difference)
        return body if body.steady is not None and body.steady.is_needed else replace(body, steady=None)

    def _follow(self, follower: Follower, body: Body) -> Difference:
        def forward(decode: list[DecodeRow], chunks: list[PromptChunk], watch: StepWatch) -> Tensor:
            return body.states(*body.layout(self._kv, decode, chunks, watch))

        try:
            return follower.follow(forward, watch_modules=not body.is_native)
        except UnsupportedAttentionError:
            raise
        except FAILURES as error:
            raise UnsupportedAttentionError(
                f"it does not run over rows of several texts as this engine needs ({one_line(error)})"
            ) from error

    def _body(self, backbone: Any, facts: Mapping[int, LayerFacts]) -> Body:
        layers = () if backbone is not self._backbone else self._blocks.layers
        return Body(backbone, _spans(facts), self._model.device, StepSlot.of(backbone), layers=layers)

    def _lm_head(self, reference: Reference) -> LMHead:
        head = LMHead.like(self._linear, self._config, reference.shown_states, reference.logits)
        difference = reference.logits_difference(head.logits)
        if difference.is_too_large:
            raise ModelLoadError(
                f"{self._name} cannot be served: the state before its LM head does not explain its logits "
                f"({difference})"
            )
        return head

    def _check_carries_nothing(self) -> None:
        """Between tokens, that is, but what attention reads of the cache."""
        blocks = self._blocks
        if others := blocks.without_attention:
            kinds = ", ".join(blocks.kinds_without_attention)
            what = (
                f"{len(others)} of its {len(blocks.layers)} layers do not attend{f' ({kinds})' if kinds else ''}, and "
            )
        elif (layer := carrying_layer(self._backbone, self._max_len)) is not None:
            what = f"before the attention of layer {layer} tokens meet in another way than by attention, and "
        else:
            return
        raise UnsupportedAttentionError(f"{what}what they carry from token to token is not kept here")

    def _check(self, difference: Difference) -> None:
        if difference.is_too_large:
            raise ModelLoadError(f"{self._name} cannot be served: {self._reason(difference)}")

    def _reason(self, difference: Difference) -> str:
        """Why a model does not come out right, as far as it can be told."""
        try:
            check_positions(self._backbone, self._facts, self._max_len)
        except CountsByCacheError as error:
            return str(error)
        except UnsupportedAttentionError:
            pass  # It says no more than the numbers do.
        return f"its numbers would not be transformers' own ({difference})"

    @property
    def _name(self) -> str:
        return type(self._model).__name__


def _backbone(model: Any) -> Any:
    """What computes the states in front of the LM head."""
    candidates = (model.get_decoder(), model.base_model, getattr(model, "model", model))
    return next((found for found in candidates if found is not model and isinstance(found, PreTrainedModel)), model)


def _spans(facts: Mapping[int, LayerFacts]) -> dict[int, Span]:
    return {index: fact.kind.span for index, fact in facts.items()}
