"""How far the policy that a response was drawn from lies from the base model's, token by token.

The divergence of all methods is one quantity: KL(q || p) in nats, where q is the distribution that a token was drawn
from and p the base model's behind the bare prompt and the same text, both at temperature 1, before penalties and before
top-p, top-k or min-p cut them short. It is a sum over the vocabulary and no estimate. Enter at `divergences`.

Shapes: T tokens of a response, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.control.plan import EditPlan
from server.engines.embedded.core import EngineCore
from server.engines.embedded.sequence import Sequence


@torch.inference_mode()
def divergences(core: EngineCore, sequence: Sequence, bare_TD: Tensor) -> Tensor:
    """Nats [T] at each token of a finished choice that kept its states, from the base model at other states [T, D].

    Control may have acted behind an instruction: its edits of the kept states are made again, to the bit on a CPU.
    """
    return kl(_drawn_logits(core, sequence), core.lm_head.logits(bare_TD))


def kl(logits_TV: Tensor, base_TV: Tensor) -> Tensor:
    """KL [T] in nats of softmax(logits) from softmax(base); zero where rounding would make it less."""
    log_probs_TV, base_log_probs_TV = logits_TV.log_softmax(dim=-1), base_TV.log_softmax(dim=-1)
    terms_TV = log_probs_TV.exp() * (log_probs_TV - base_log_probs_TV)
    # Of a token that cannot be drawn, whatever the base model gives it.
    return torch.where(log_probs_TV == -torch.inf, 0.0, terms_TV).sum(dim=-1).clamp(min=0.0)


def _drawn_logits(core: EngineCore, sequence: Sequence) -> Tensor:
    """The logits [T, V] that a choice's tokens were drawn from, but for bias and penalties."""
    states_TD = torch.stack(sequence.states or [])
    controls, told = zip(*sequence.acted, strict=True)
    plan = EditPlan.from_rows(controls, core.registry, device=states_TD.device).at(lambda token: told[token])
    instructed: dict[int, Tensor] = {}
    if behind := list(sequence.request.instructed_token_ids):
        read_TD = core.states([*behind, *sequence.token_ids[:-1]])[len(behind) - 1 :]
        instructed = dict(enumerate(read_TD))
    logits_TV, _ = core.editor.logits(states_TD, plan, instructed)
    return logits_TV
