"""Shadows: the second row of a choice that follows an instruction, which reads the same text behind that instruction.

A shadow is a sequence with a prompt of its own and the choice's own list of tokens. It is admitted, preempted, resumed
and ended with its choice, but reads its prompt as any other, so that instructions and prompts that others have read are
found in the cache, and the choices of a request share it. A choice draws once both have read all of the text; whoever
is first waits with its state. Where candidates compete there are no shadows: such requests are refused. Knows nothing
of edits. Enter at `with_shadows`, `both_read` and `instructed_states`.

Shapes: D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from server.engines.embedded.model.pages import num_pages_for
from server.engines.embedded.sequence import PromptGroup, Sequence
from server.errors import InvalidRequestError
from server.types import GenerationRequest

_PARAM = "control.objective"
Rows = list[tuple[Sequence, Tensor]]
"""Sequences, each with the state [D] behind its next token."""


def with_shadows(choices: list[Sequence]) -> list[Sequence]:
    """A request's choices, each with a shadow where they follow an instruction and draw tokens."""
    request = choices[0].request
    if request.instructed_token_ids and request.sampling.max_tokens:
        group = PromptGroup(list(request.instructed_token_ids))
        for choice in choices:
            choice.shadow = replace(choice, group=group, pages=[], shadow_of=choice)
    return choices


def check_shadows(request: GenerationRequest, *, max_rows: int, num_pages: int) -> None:
    """Whether a choice and its shadow fit the engine when they have it for themselves. Raises InvalidRequestError."""
    if not request.instructed_token_ids:
        return
    if max_rows < 2:
        raise InvalidRequestError(
            f"{_PARAM}: to follow an instruction takes two rows at once; this server runs {max_rows}", param=_PARAM
        )
    lengths = (len(request.prompt_token_ids), len(request.instructed_token_ids))
    needed = sum(num_pages_for(length + request.sampling.max_tokens) for length in lengths)
    if needed > num_pages:
        raise InvalidRequestError(
            f"{_PARAM}: with an instruction the prompt is read twice ({lengths[0]} and {lengths[1]} tokens), which "
            f"with {request.sampling.max_tokens} new ones may take {needed} pages of keys and values; this server has "
            f"{num_pages}",
            param=_PARAM,
        )


def both_read(computed: Rows) -> Rows:
    """Of sequences whose states are computed, those that may go on: a choice and its shadow wait for each other."""
    ready: Rows = []
    for sequence, hidden_D in computed:
        choice = sequence.owner
        if choice.shadow is None:
            ready.append((sequence, hidden_D))
            continue
        # A copy: where steps are recorded, the next one's states come to the same place.
        sequence.waiting_D = hidden_D.clone()
        if choice.waiting_D is not None and choice.shadow.waiting_D is not None:
            ready.append((choice, choice.waiting_D))
    return ready


def instructed_states(rows: list[Sequence]) -> dict[int, Tensor]:
    """By row, the states behind the instructed texts of those that draw now; nobody waits with them any more."""
    states: dict[int, Tensor] = {}
    for row, choice in enumerate(rows):
        if choice.shadow is not None and choice.shadow.waiting_D is not None:
            states[row] = choice.shadow.waiting_D
            choice.waiting_D = choice.shadow.waiting_D = None
    return states
