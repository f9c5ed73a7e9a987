"""Shows on the model at hand that this engine computes what transformers computes, before anything is served.

Two texts run through transformers' own forward, each alone; what every layer got and gave is kept. Then the engine
computes them its own way: beside each other, in chunks that end within pages, and by decode rows. Every layer is given
what it got in transformers, so that its error is its own and not what earlier layers' rounding made of it; what its
attention gives and what it gives as a whole must be the same but for rounding. Knows nothing of requests. Enter at
`Reference.of` and `Follower`.

Shapes: T tokens, D hidden size, V vocabulary; "rows" have a token on their first axis and everything else on the
second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from server.engines.embedded.model.attention import PROJECTIONS
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepWatch
from server.engines.embedded.model.pages import NULL_PAGE, PAGE_TOKENS
from server.engines.embedded.model.takeover.facts import LayerFacts

WATCHED_NAME = "recontrol_watched"
_STRIDE = 7919
_TINY = 1e-20
LONGEST = PAGE_TOKENS + 15
"""Tokens of the longer text, where the model can have as many: more than a page."""
_PAGES = ([NULL_PAGE + 2, NULL_PAGE + 1], [NULL_PAGE + 3])
PROOF_PAGES = NULL_PAGE + 4
"""Of a cache that holds the two texts, the null page included."""
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of the norm of what a layer's attention or a layer adds; some ten times what rounding does."""
_ROUNDED_RESIDUAL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of the norm of the states that a layer adds to, which are rounded with it."""


@dataclass(slots=True)
class Blocks:
    """The decoder layers of a backbone, each with its attention if it has one that goes through the interface."""

    layers: list[nn.Module]
    attention: dict[int, nn.Module]

    @classmethod
    def of(cls, backbone: nn.Module, facts: Mapping[int, LayerFacts]) -> Blocks:
        """The longest list of modules of which several attend; none where a backbone has no such list."""
        attending = {fact.module for fact in facts.values()}

        def number(blocks: nn.ModuleList) -> int:
            return sum(any(module in attending for module in block.modules()) for block in blocks)

        lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
        best = max(lists, key=number, default=None)
        if best is None or not number(best):
            return cls([], {})
        layers = list(best)
        attention = {
            index: module for index, layer in enumerate(layers) for module in layer.modules() if module in attending
        }
        return cls(layers, attention)

    @property
    def without_attention(self) -> list[int]:
        return [index for index in range(len(self.layers)) if index not in self.attention]

    @property
    def kinds_without_attention(self) -> list[str]:
        """Names of the modules that layers without attention have, and those with it do not."""
        kinds = [{type(module).__name__ for module in layer.children()} for layer in self.layers]
        of_attending = set().union(*(kinds[index] for index in self.attention))
        return sorted(set().union(*(kinds[index] for index in self.without_attention)) - of_attending)


@dataclass(slots=True)
class Reference:
    """What transformers' own forward makes of the two texts."""

    blocks: Blocks
    texts: list[list[int]]
    seen: dict[tuple[int, int, str], Tensor]
    """By text, layer and what it is, rows [T, X]: what a layer `entered` got, what its attention and it itself gave
    (`attended`, `left`), and, if attention was watched, its PROJECTIONS."""
    axes: dict[tuple[int, str], int]
    """Which axis holds the tokens of what a layer gets and gives."""
    states: list[Tensor]
    """By text, [T, D], behind the last norm."""
    logits: Tensor
    """[T, V] of `shown_states`."""

    @classmethod
    def of(
        cls, model: Any, backbone: nn.Module, facts: Mapping[int, LayerFacts], length: int, *, watch_attention: bool
    ) -> Reference:
        """With the attention that the model is set to; `length` of the longer text.

        To watch it takes another name for it, which some models with code for a certain attention would not know.
        """
        vocab_size = model.config.get_text_config().vocab_size
        ids = [(number + 1) * _STRIDE % vocab_size for number in range(length + length // 4)]
        reference = cls(Blocks.of(backbone, facts), [ids[:length], ids[length:]], {}, {}, [], torch.empty(0))
        with _attention_watched(backbone, reference._keep) if watch_attention else nullcontext():
            for text in reference.texts:
                reference._read(model, backbone, text)
        return reference

    @property
    def shown_states(self) -> Tensor:
        """[T, D] of the shorter text, whose logits the LM head is shown on."""
        return self.states[-1]

    def rows(self, layer: int, what: str, tokens: Sequence[tuple[int, int]]) -> Tensor | None:
        """[T, X] of these (text, position); None where nothing of it was seen."""
        held = [self.seen.get((text, layer, what)) for text in range(len(self.texts))]
        known = [rows_TX for rows_TX in held if rows_TX is not None]
        if len(known) < len(held):
            return None
        starts = (0, len(known[0]))
        return torch.cat(known)[[starts[text] + position for text, position in tokens]]

    def logits_difference(self, logits: Callable[[Tensor], Tensor]) -> Difference:
        """Between the model's logits and those [T, V] that a function gives of its states [T, D]."""
        states_TD, logits_TV = self.shown_states, self.logits
        allowed_T = _ALLOWED[states_TD.dtype] * logits_TV.norm(dim=1)
        difference = Difference()
        difference.add(float(((logits(states_TD) - logits_TV).norm(dim=1) / allowed_T).max()), "the logits")
        return difference

    def _read(self, model: Any, backbone: nn.Module, text: list[int]) -> None:
        def keep(layer: int, what: str, given: Tensor) -> Tensor:
            axis = next(axis for axis, size in enumerate(given.shape) if size == len(text))
            self.axes[layer, what] = axis
            self._keep(layer, what, given.movedim(axis, 0))
            return given

        states: list[Tensor] = []
        handle = backbone.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state[0]))
        try:
            with _watched(self.blocks, keep):
                output = model(torch.tensor([text], device=model.device), use_cache=False)
        finally:
            handle.remove()
        self.states.append(states[0])
        self.logits = output.logits[0].float()

    def _keep(self, layer: int, what: str, given: Tensor) -> None:
        """Of the text that is being read, whose states come last; tokens are on the first axis."""
        self.seen[len(self.states), layer, what] = given.detach().flatten(1).clone()


@contextmanager
def _attention_watched(backbone: Any, watch: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Tell `watch` of the queries, keys and values [T, ...] of each layer, whose attention computes as before.

    Nothing is told of attention that does not go through transformers' interface.
    """
    own: str = backbone.config._attn_implementation
    attention = AttentionInterface().get(own)
    if attention is None:
        yield
        return

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer: int = module.layer_idx  # type: ignore[assignment]
        for what, given in zip(PROJECTIONS, args, strict=False):
            watch(layer, what, given[0].transpose(0, 1))
        return attention(module, *args, **kwargs)

    AttentionInterface.register(WATCHED_NAME, watched)
    AttentionMaskInterface.register(WATCHED_NAME, AttentionMaskInterface()[own])
    backbone.set_attn_implementation(WATCHED_NAME)
    try:
        yield
    finally:
        backbone.set_attn_implementation(own)


@contextmanager
def _watched(blocks: Blocks, watch: Callable[[int, str, Tensor], Tensor]) -> Iterator[None]:
    """Tell `watch` what each layer gets and gives, by its place; it says what the layer is to go on with."""

    def before(layer: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (watch(layer, "entered", args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": watch(layer, "entered", kwargs["hidden_states"])}

        return hook

    def behind(layer: int, what: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            watch(layer, what, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(blocks.layers):
            hooks.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(behind(index, "left")).remove)
        for index, module in blocks.attention.items():
            hooks.callback(module.register_forward_hook(behind(index, "attended")).remove)
        yield


@dataclass(slots=True)
class Difference:
    """Where the engine's numbers are furthest from transformers', as a share of what is allowed."""

    share: float = 0.0
    where: str = "nowhere"

    def add(self, share: float, where: str) -> None:
        # Anything that is not a number counts as the largest.
        if not share <= self.share:
            self.share, self.where = share, where

    @property
    def is_too_large(self) -> bool:
        return not self.share <= 1.0

    def __str__(self) -> str:
        return f"{self.where} differs by {self.share:.2g} times what rounding explains"


@dataclass(slots=True, frozen=True)
class _Step:
    """What the engine computes at once: decode rows as (text, position), then chunks as (text, start, end)."""

    decode: list[tuple[int, int]]
    chunks: list[tuple[int, int, int]]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [*self.decode, *((text, p) for text, start, end in self.chunks for p in range(start, end))]


def _steps(long: int, short: int) -> list[_Step]:
    """Two chunks beside each other; a chunk beside a decode row; decode rows alone."""
    cut = (long - 1) // 2
    return [
        _Step([], [(0, 0, cut), (1, 0, short - 1)]),
        _Step([(1, short - 1)], [(0, cut, long - 2)]),
        _Step([(0, long - 2)], []),
        _Step([(0, long - 1)], []),
    ]


Forward = Callable[[list[DecodeRow], list[PromptChunk], StepWatch], Tensor]
"""Decode rows, chunks and who watches -> states [T, D]."""


class Follower:
    """Compares the layers of the engine's steps over the two texts with a reference, and keeps them on its track."""

    def __init__(self, reference: Reference, dtype: torch.dtype, *, has_experts: bool) -> None:
        self._shares: defaultdict[str, list[Tensor]] = defaultdict(list)
        """By what is compared, of every row."""
        self._reference, self._has_experts = reference, has_experts
        self._allowed, self._rounded = _ALLOWED[dtype], _ROUNDED_RESIDUAL[dtype]
        self._steps = _steps(*map(len, reference.texts))
        self._number = 0
        """Of the step."""
        self._projections: dict[tuple[int, int, str], Tensor] = {}
        self._is_first_layer = True

    def follow(self, forward: Forward, *, watch_modules: bool) -> Difference:
        """Run all steps. Transformers' modules are watched from outside; other layers tell by themselves."""
        self._shares.clear()
        texts, states = self._reference.texts, self._reference.states
        watched = _watched(self._reference.blocks, self._saw_module) if watch_modules else nullcontext()
        with watched:
            for number, step in enumerate(self._steps):
                self._number, self._is_first_layer = number, True
                rows = [DecodeRow(_PAGES[text], position, texts[text][position]) for text, position in step.decode]
                chunks = [PromptChunk(_PAGES[text], start, texts[text][start:end]) for text, start, end in step.chunks]
                hidden_TD = forward(rows, chunks, self)
                expected_TD = torch.stack([states[text][position] for text, position in step.tokens])
                self._compare(hidden_TD, expected_TD, "the state behind its last norm")
        difference = Difference()
        for where, shares in self._shares.items():
            shares_T = torch.cat(shares)
            # Some rows are rounded worse than others, and with experts rounding may send one another way.
            difference.add(float(shares_T.quantile(0.5 if self._has_experts else 0.9)), where)
        return difference

    @property
    def _step(self) -> _Step:
        return self._steps[self._number]

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        """See `StepWatch`; rows [T, X]."""
        rows = given.flatten(1)
        if what in PROJECTIONS:
            self._saw_projection(layer, what, rows)
            return given
        expected = self._reference.rows(layer, what, self._step.tokens)
        if expected is None:
            return given
        if what == "entered":
            if self._is_first_layer:
                self._compare(rows, expected, "what its first layer gets")
            self._is_first_layer = False
            return expected.view(given.shape)
        if what == "attended":
            self._compare(rows, expected, f"the attention of layer {layer}")
        else:
            entered = self._reference.rows(layer, "entered", self._step.tokens)
            self._compare(rows, expected, f"layer {layer}", entered)
        return given

    def _saw_module(self, layer: int, what: str, given: Tensor) -> Tensor:
        """As `saw`, of a tensor in the shape that transformers' modules have it in."""
        axis = self._reference.axes.get((layer, what))
        if axis is None:
            return given
        return self.saw(layer, what, given.movedim(axis, 0)).movedim(0, axis)

    def _saw_projection(self, layer: int, what: str, rows: Tensor) -> None:
        """Where nothing is known of transformers' own, the engine that runs first is what the next is held to."""
        key = (self._number, layer, what)
        if key not in self._projections:
            expected = self._reference.rows(layer, what, self._step.tokens)
            self._projections[key] = rows.clone() if expected is None else expected
        self._compare(rows, self._projections[key], f"the {what} of layer {layer}")

    def _compare(self, ours_TX: Tensor, theirs_TX: Tensor, where: str, entered_TX: Tensor | None = None) -> None:
        """Keep each row's error as a share of what is allowed; decode rows apart, which a lost state alone may show."""
        ours_TX, theirs_TX = ours_TX.float(), theirs_TX.float()
        size_T = theirs_TX.norm(dim=1)
        allowed_T = self._allowed * size_T
        if entered_TX is not None:
            added_T = (theirs_TX - entered_TX.float()).norm(dim=1)
            allowed_T = self._allowed * added_T + self._rounded * size_T
        share_T = (ours_TX - theirs_TX).norm(dim=1) / allowed_T.clamp(min=_TINY)
        num_decode = len(self._step.decode)
        for place, part_T in ((f"{where} in decoding", share_T[:num_decode]), (where, share_T[num_decode:])):
            if len(part_T):
                self._shares[place].append(part_T)
