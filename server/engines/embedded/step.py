"""What one forward pass computes, and whose it is. Enter at `Step`."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engines.embedded.model.layout import DecodeRow, Segment
from server.engines.embedded.model.pages import PAGE_TOKENS
from server.engines.embedded.sequence import Sequence


@dataclass(slots=True)
class Step:
    """What one forward pass computes: rows of decoding sequences, then prompt chunks."""

    decoding: list[tuple[Sequence, list[DecodeRow]]] = field(default_factory=list)
    """A sequence's rows; several while it feeds again what it had before it lost its pages, for which it comes last."""
    chunks: list[tuple[Sequence, Segment]] = field(default_factory=list)
    complete: list[Sequence] = field(default_factory=list)
    """Those whose prompt is computed after this step."""
    num_usual: int = 0
    """Of the decoding sequences, those that feed one token as at every step; all that others feed is for pace.py."""

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """What comes beside the usual rows: (position, tokens)."""
        fed_again = [(rows[0].position, len(rows)) for _, rows in self.decoding[self.num_usual :]]
        return fed_again + [(segment.start, len(segment.token_ids)) for _, segment in self.chunks]


def next_chunk(sequence: Sequence, count: int) -> Segment:
    """About so many of the prompt's next tokens: to a page's end where that leaves out a quarter at most, since pages
    are attended one by one."""
    start = sequence.num_computed
    end = start + count
    paged = end // PAGE_TOKENS * PAGE_TOKENS
    if end < sequence.prompt_len and 4 * (end - paged) <= count:
        end = paged
    return Segment(sequence.pages, start, sequence.group.token_ids[start:end])
