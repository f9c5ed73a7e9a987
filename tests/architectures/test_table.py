"""docs/architectures.md is complete, up to date with its JSON, and without faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.models import Case
from tests.architectures.table import read_json, render

_DOCS = Path(__file__).parents[2] / "docs"


def test_no_architecture_is_served_wrongly_or_fails() -> None:
    _, verdicts = read_json(_DOCS / "architectures.json")
    assert [verdict.name for verdict in verdicts if verdict.is_fault] == []


def test_the_table_lists_every_class_of_the_transformers_that_it_names() -> None:
    versions, verdicts = read_json(_DOCS / "architectures.json")
    if versions["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {versions['transformers']}; `make architectures` makes it anew")
    expected = [(name, Case(name).class_name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert [(v.model_type, v.class_name) for v in verdicts if not v.variant] == expected


def test_the_table_is_what_its_json_says() -> None:
    assert (_DOCS / "architectures.md").read_text() == render(*read_json(_DOCS / "architectures.json"))
