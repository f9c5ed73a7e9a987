"""A token for each of a step's rows from logits after control: rules (logits.py), schemas (structure.py), the sampler.

On a GPU with Triton all of it is one launch (rule_tables.py); elsewhere each changes a copy of the logits in turn.
Knows nothing of control or of models. Enter at `TokenDraw.tokens`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from server.engines.embedded.logits import adjusted
from server.engines.embedded.rule_tables import RuleRows
from server.engines.embedded.sampler import sample
from server.engines.embedded.sequence import Sequence
from server.engines.embedded.structure import constrained
from server.kernels import gpu


class TokenDraw:
    def __init__(self) -> None:
        self._rule_rows = RuleRows()

    def tokens(self, logits_BV: Tensor, rows: list[Sequence]) -> Tensor:
        """Token ids [B] int64, -1 of a row that none can be drawn for; the logits stay as they are."""
        rules = None
        if gpu.are_used_on(logits_BV.device):
            rules = self._rule_rows.tables(rows, logits_BV.shape[1], logits_BV.device)
        else:
            logits_BV = adjusted(logits_BV, [s.logit_rules for s in rows], [s.token_ids for s in rows])
            logits_BV = constrained(logits_BV, [s.held_to for s in rows])
        return sample(logits_BV, [s.row_sampling for s in rows], [len(s.token_ids) for s in rows], rules)
