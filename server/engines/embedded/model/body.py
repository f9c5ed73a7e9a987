"""The layers of a model as steps run through them: from token ids to states behind the final norm.

Knows nothing of where the layers come from. Enter at `Body`.

Shapes: T tokens of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepLayout, StepSlot, StepWatch
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.spans import Span
from server.engines.embedded.model.steady import Steady
from server.kernels.transfer import on_device


@dataclass(slots=True, frozen=True)
class Body:
    backbone: Any
    """Transformers' own, or one that is called as they are."""
    spans: Mapping[int, Span]
    """By index of the layer, what its attention sees."""
    device: torch.device
    slot: StepSlot = field(default_factory=StepSlot)
    steady: Steady | None = None
    """For a backbone that needs it."""
    layers: Sequence[nn.Module] = ()
    """Of transformers' own; native layers tell a watch by themselves."""

    @property
    def is_native(self) -> bool:
        return isinstance(self.backbone, NativeLlama)

    def layout(
        self, kv: KVCache, decode: list[DecodeRow], chunks: list[PromptChunk], watch: StepWatch | None = None
    ) -> tuple[Tensor, StepLayout]:
        """Token ids [T], and where they stand: a row for each decode row, then for each token of the chunks."""
        token_ids = [row.token_id for row in decode]
        for chunk in chunks:
            token_ids += chunk.token_ids
        step = StepLayout.of(kv, decode, chunks, self.device, self.spans, watch)
        return on_device(token_ids, self.device), step

    def states(self, token_ids_T: Tensor, step: StepLayout) -> Tensor:
        """[T, D] in the model's dtype."""
        self.slot.step = step
        with self.steady or nullcontext():
            output = self.backbone(input_ids=token_ids_T[None], position_ids=step.positions_T[None], use_cache=False)
        return output.last_hidden_state[0]

    def watched_states(self, token_ids_T: Tensor, step: StepLayout) -> Tensor:
        """States [T, D] as from `states`, while the step's watch is told what each layer gets, and says what it goes on
        with."""
        with _watched(self.layers, step.watch):
            return self.states(token_ids_T, step)


@contextmanager
def _watched(layers: Sequence[nn.Module], watch: StepWatch | None) -> Iterator[None]:
    """Transformers' layers, whose states are [1, T, D]."""

    def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert watch is not None
        if args:
            return (watch.saw(index, "entered", args[0][0])[None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": watch.saw(index, "entered", kwargs["hidden_states"][0])[None]}

    with ExitStack() as hooks:
        for index, layer in enumerate(layers if watch is not None else ()):
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
        yield
