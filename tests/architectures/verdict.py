"""What the judge found of one case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.architectures.judge import Served

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`unbuildable` says why transformers itself cannot build or run the model here; else there is an entry a precision."""

    name: str
    class_name: str
    served: dict[str, Served]
    unbuildable: str = ""

    @property
    def is_fault(self) -> bool:
        return any(served.outcome == "fault" for served in self.served.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Verdict:
        return cls(**{**row, "served": {dtype: Served(**served) for dtype, served in row["served"].items()}})

    def __str__(self) -> str:
        if self.unbuildable:
            return f"{self.name}: not built: {self.unbuildable}"
        parts = [
            f"{dtype} {s.outcome}" + (f" ({s.reason})" if s.reason else f" {s.largest:.2g} nats (mean {s.mean:.2g}; noise {s.noise_largest:.2g}, {s.noise_mean:.2g})")
            for dtype, s in self.served.items()
        ]
        return f"{self.name}: {'; '.join(parts)}"
