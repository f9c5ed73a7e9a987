"""What each layer's attention does, asked of the model itself.

A few tokens run through the model with an attention function that only takes notes, and with a mask function to which
transformers hands the model's own rule of who sees whom. So a window that stands in a mask and nowhere else, a layer
that does not rotate, or sinks are known and not guessed from names. Knows nothing of requests or kernels. Enter at
`ask`.

Shapes: T tokens, N key-value heads, P size of an attention head.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from server.engines.embedded.model.attention import UnsupportedAttentionError, attention_kind, unknown_options
from server.engines.embedded.model.layout import StepSlot
from server.engines.embedded.model.spans import ALL_BEFORE, AttentionKind, Span

NOTES_NAME = "recontrol_notes"
_TOKENS = 3
_SAME_LENGTH = 5e-3
"""Relative, of vectors that differ by a rotation and by rounding."""
_EXPERTS_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
"""What a model raises that is called in a way that it does not know."""
MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Of transformers: batch index, head index, query positions, key positions -> whether the query sees the key."""


@dataclass(slots=True, frozen=True)
class LayerFacts:
    """One layer's attention. Layers of one model may differ in everything."""

    module: nn.Module
    kind: AttentionKind
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    has_sinks: bool
    far: tuple[Tensor, Tensor]
    """Queries and keys at the last positions of a text, [1, heads, tokens, P]."""
    rotates: bool = False
    """Whether its queries depend on their positions."""
    only_turns: bool = True
    """Whether queries and keys are as long at the end of a text as at its beginning, as rotation leaves them."""


@dataclass(slots=True)
class _Notes:
    """Of one forward pass, by index of the layer."""

    max_len: int
    layers: dict[int, LayerFacts] = field(default_factory=dict)
    states_TD: Tensor | None = None
    """Behind the last norm."""

    def take(
        self, module: nn.Module, rows: tuple[Tensor, Tensor, Tensor], kind: AttentionKind, *, has_sinks: bool
    ) -> None:
        query, key, value = rows
        index: int = module.layer_idx  # type: ignore[assignment]
        if index in self.layers:
            # Layers that share one attention have no index of their own.
            which = f"layer {index}" if index >= 0 else "what several layers share"
            raise UnsupportedAttentionError(f"{which} attends more than once for a token")
        _, num_heads, num_tokens, key_size = query.shape
        if num_tokens != _TOKENS or key.shape[2] != _TOKENS:
            raise UnsupportedAttentionError(f"layer {index} attends to something else than the text")
        self.layers[index] = LayerFacts(
            module, kind, num_heads, key.shape[1], key_size, value.shape[3], has_sinks, (query, key)
        )


def ask(backbone: Any, max_len: int) -> dict[int, LayerFacts]:
    """By index of the layer, in the order of the layers. The backbone is left with this function's attention.

    Raises UnsupportedAttentionError for attention that this engine does not do, or that cannot be asked.
    """
    AttentionInterface.register(NOTES_NAME, _note)
    AttentionMaskInterface.register(NOTES_NAME, _mask)
    backbone.set_attn_implementation(NOTES_NAME)
    try:
        near, far = (_notes(backbone, max_len, start).layers for start in (0, max_len - _TOKENS))
    except FAILURES as error:
        if isinstance(error, UnsupportedAttentionError):
            raise
        raise UnsupportedAttentionError(
            f"its attention does not go through transformers' interface as this engine needs ({one_line(error)})"
        ) from error
    if not far:
        raise UnsupportedAttentionError(
            f"none of its layers attends through transformers' interface (a layer has {_parts(backbone)})"
        )
    return {
        index: replace(
            facts,
            rotates=not torch.equal(facts.far[0], near[index].far[0]),
            only_turns=all(map(_are_as_long, facts.far, near[index].far)),
        )
        for index, facts in sorted(far.items())
    }


def carrying_layer(backbone: Any, max_len: int) -> int | None:
    """The first layer whose queries for a token depend on tokens before it although nothing was attended to.

    What else is carried from token to token, by a convolution, a recurrence or a shift, this engine does not keep. The
    backbone must have this file's attention. The number of layers stands for the state behind the last one.
    """
    one, other = (_notes(backbone, max_len, 0, ids=[*before, _TOKENS]) for before in ((1, 2), (4, 5)))
    allowed = 0.0
    if has_experts(backbone):
        # Their products' sums depend on how many tokens choose which.
        allowed = _EXPERTS_ROUNDING[one.layers[next(iter(one.layers))].far[0].dtype]
    for index, fact in sorted(one.layers.items()):
        mine, its = fact.far[0][:, :, -1], other.layers[index].far[0][:, :, -1]
        if not (mine - its).norm() <= allowed * mine.norm():
            return index
    assert one.states_TD is not None
    assert other.states_TD is not None
    mine, its = one.states_TD[-1], other.states_TD[-1]
    return None if (mine - its).norm() <= allowed * mine.norm() else len(one.layers)


def has_experts(backbone: nn.Module) -> bool:
    """Whether tokens choose among maps, so that rounding may send one another way."""
    names = {type(module).__name__.lower() for module in backbone.modules()}
    return any("expert" in name or "moe" in name or "router" in name for name in names)


def _are_as_long(one: Tensor, other: Tensor) -> bool:
    lengths = one.float().norm(dim=-1), other.float().norm(dim=-1)
    return bool((lengths[0] - lengths[1]).norm() <= _SAME_LENGTH * lengths[1].norm())


def _notes(
    backbone: Any, max_len: int, start: int, ids: Sequence[int] = range(1, _TOKENS + 1), **options: Any
) -> _Notes:
    notes = _Notes(max_len)
    StepSlot.of(backbone, notes)
    ids_T = torch.tensor(list(ids), device=backbone.device)
    positions_T = torch.arange(start, start + _TOKENS, device=backbone.device)
    output = backbone(input_ids=ids_T[None], position_ids=positions_T[None], **{"use_cache": False, **options})
    notes.states_TD = output.last_hidden_state[0]
    return notes


def check_positions(backbone: Any, facts: Mapping[int, LayerFacts], max_len: int) -> None:
    """Whether the model takes positions from where they are given alone, also far into a text.

    Some scale queries by the length of transformers' cache, which this engine does not use; most only after thousands
    of tokens, so that no short text shows it. The backbone is left with this file's attention. Raises
    UnsupportedAttentionError.
    """
    backbone.set_attn_implementation(NOTES_NAME)
    start = max_len - _TOKENS
    name = "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"
    past: dict[str, Any] = {name: _Past(start), "use_cache": True}
    try:
        with_past = _notes(backbone, max_len, start, **past)
    except FAILURES as error:
        if isinstance(error, UnsupportedAttentionError):
            raise
        raise UnsupportedAttentionError(
            f"it cannot be seen whether it counts positions by a cache ({one_line(error)})"
        ) from error
    for index, fact in facts.items():
        if not torch.equal(fact.far[0], with_past.layers[index].far[0]):
            raise CountsByCacheError(f"layer {index} counts positions by the length of a cache")


class CountsByCacheError(UnsupportedAttentionError):
    """The model takes positions from the length of transformers' cache, which this engine does not use."""


class _Past(DynamicCache):
    """A cache of so many tokens of which nothing is kept."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_mask_sizes(self, query_length: Any, *_: Any, **__: Any) -> tuple[int, int]:
        return self._length + int(query_length), 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _note(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Every token attends to itself alone, so that states do not depend on positions."""
    if unknown := unknown_options(options):
        raise UnsupportedAttentionError(f"its attention takes {', '.join(sorted(unknown))}, which are not served")
    notes: _Notes = module.recontrol.step  # type: ignore[union-attr]
    kind = attention_kind(key, scaling, softcap, _span(module, attention_mask, notes.max_len))
    notes.take(module, (query, key, value), kind, has_sinks=s_aux is not None)
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _mask(*, mask_function: MaskFunction, q_length: int, kv_length: int, device: Any = None, **_: Any) -> Tensor:
    """A mask that carries its rule along; one that the model has worked on comes without."""
    mask = torch.ones(1, 1, int(q_length), int(kv_length), dtype=torch.bool, device=device)
    mask.rule = mask_function  # type: ignore[attr-defined]
    return mask


def _span(module: nn.Module, mask: Tensor | None, max_len: int) -> Span:
    """Raises UnsupportedAttentionError for a rule that is no `Span`."""
    if mask is None:
        if not getattr(module, "is_causal", True):
            raise UnsupportedAttentionError("its attention looks ahead")
        return ALL_BEFORE
    if not hasattr(mask, "rule"):
        raise UnsupportedAttentionError("its attention masks are of its own making")
    # Layers of one kind are given one mask.
    if not hasattr(mask, "span"):
        mask.span = _span_of_rule(mask.rule, max_len, mask.device)  # type: ignore[attr-defined]
    return mask.span  # type: ignore[attr-defined]


def _span_of_rule(rule: MaskFunction, max_len: int, device: torch.device) -> Span:
    positions = torch.arange(max_len, device=device)

    def sees(last: int) -> Tensor:
        zero = positions.new_zeros(())
        return torch.as_tensor(rule(zero, zero, positions.new_tensor([last]), positions)).expand(max_len)

    span = _guess(sees, max_len)
    tried = {0, 1, 2, max_len // 3, max_len // 2, max_len - 2, max_len - 1}
    for size in (span.window, span.chunk):
        tried |= {size - 1, size, size + 1, 2 * size - 1, 2 * size} if size else set()
    for last in sorted(position for position in tried if 0 <= position < max_len):
        if not torch.equal(sees(last), span.visible(positions, positions.new_tensor(last))):
            raise UnsupportedAttentionError("its attention mask is no window, no chunk and not all that comes before")
    return span


def _guess(sees: Callable[[int], Tensor], max_len: int) -> Span:
    """The first position that does not see position 0 tells the size; what it sees tells the kind."""
    size = bisect.bisect_left(range(max_len), True, key=lambda last: not bool(sees(last)[0]))
    if size >= max_len:
        return ALL_BEFORE
    return Span(window=size) if size == 1 or bool(sees(size)[size - 1]) else Span(chunk=size)


def _parts(backbone: nn.Module) -> str:
    """What a layer consists of: a layer is an element of the longest list of modules."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    return ", ".join(dict.fromkeys(type(part).__name__ for layer in layers for part in layer.children())) or "no parts"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
