"""Decode steps as recorded graphs, one for each bucket of batch size and of pages: on a GPU, launching a small model's
kernels one by one takes longer than running them.

A bucket has its own buffers for a step's inputs. A step pads its rows to the bucket, copies them into the buffers and
replays the graph; padding rows write to the null page, which nothing reads. The graph ends with the states after the
final norm, so the edit and the LM head come behind it and may differ from step to step. How a graph is recorded is
given from outside: tests on a CPU call the function again instead. Knows nothing of requests. Enter at
`DecodeGraphs.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.engines.embedded.model.layout import StepLayout
from server.engines.embedded.model.pages import NULL_PAGE

Backbone = Callable[[Tensor, StepLayout], Tensor]
"""Token ids [T] of a step -> states [T, D]."""
Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]
"""Of a computation: its result's buffer, and what computes it anew from the inputs' buffers."""
_MAX_ROWS = 512


@dataclass(slots=True, frozen=True)
class _Recorded:
    token_ids_B: Tensor
    step: StepLayout
    states_BD: Tensor
    replay: Replay


class DecodeGraphs:
    def __init__(self, backbone: Backbone, record: Record) -> None:
        self._backbone = backbone
        self._record = record
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def forward(self, token_ids_B: Tensor, step: StepLayout) -> Tensor:
        """States [B, D] of decode rows alone. They stay valid until the next step."""
        num_rows, num_pages = step.tables.shape
        if num_rows > _MAX_ROWS:
            return self._backbone(token_ids_B, step)
        bucket = (_next_power(num_rows), _next_power(num_pages))
        if bucket not in self._recorded:
            self._recorded[bucket] = self._make(bucket, token_ids_B, step)
        graph = self._recorded[bucket]
        _fill(graph.token_ids_B, token_ids_B)
        _fill(graph.step.positions_T, step.positions_T)
        graph.step.tables.fill_(NULL_PAGE)
        graph.step.tables[:num_rows, :num_pages] = step.tables
        graph.replay()
        return graph.states_BD[:num_rows]

    def _make(self, bucket: tuple[int, int], token_ids_B: Tensor, step: StepLayout) -> _Recorded:
        rows, pages = bucket
        held = replace(
            step,
            positions_T=step.positions_T.new_zeros(rows),
            sequences_T=torch.arange(rows, device=token_ids_B.device),
            tables=step.tables.new_full((rows, pages), NULL_PAGE),
            num_decode=rows,
            masks={},
        )
        ids = token_ids_B.new_zeros(rows)
        states_BD, replay = self._record(lambda: self._backbone(ids, replace(held, masks={})))
        return _Recorded(ids, held, states_BD, replay)


def record_on_cuda(compute: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """A CUDA graph, recorded after two runs that settle workspaces and kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = compute()
    return states, graph.replay


def _next_power(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _fill(buffer: Tensor, values: Tensor) -> None:
    buffer.zero_()
    buffer[: len(values)] = values
