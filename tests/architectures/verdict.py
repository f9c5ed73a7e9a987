"""What the judge found of one case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.architectures.judge import Served


@dataclass(frozen=True, slots=True)
class Verdict:
    """An entry a precision; or `unbuildable` says why transformers itself cannot build or run the model here."""

    name: str
    class_name: str
    served: dict[str, Served]
    unbuildable: str = ""

    @property
    def model_type(self) -> str:
        return self.name.partition("+")[0]

    @property
    def variant(self) -> str:
        return self.name.partition("+")[2]

    @property
    def is_applicable(self) -> bool:
        """Not so for a variant that is no other model."""
        return bool(self.served or self.unbuildable)

    @property
    def is_fault(self) -> bool:
        return self.outcome == "fault"

    @property
    def outcome(self) -> str:
        """A fault in any precision is one; else what bfloat16 came to."""
        if self.unbuildable:
            return "unbuildable"
        outcomes = [served.outcome for served in self.served.values()] or ["none"]
        return "fault" if "fault" in outcomes else outcomes[-1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Verdict:
        return cls(**{**row, "served": {dtype: Served(**served) for dtype, served in row["served"].items()}})

    def __str__(self) -> str:
        if self.unbuildable:
            return f"{self.name}: not built: {self.unbuildable}"
        return f"{self.name}: " + "; ".join(f"{dtype} {served}" for dtype, served in self.served.items())
