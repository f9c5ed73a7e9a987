"""Which prompts an evaluation is of: those of a split, the locked ones, or what the quick study takes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.quality.command import Quality
from server.cli.evaluate import Eval
from value_models.prompt_sets import split_of


def test_locked_prompts_take_the_place_of_the_projects_own_and_are_called_so() -> None:
    locked = Eval.model_validate({"head": "positive", "split": "locked"})
    ids = [prompt.id for prompt in locked.test_prompts()]
    assert len(ids) == 72
    assert all(prompt_id.startswith("locked-") for prompt_id in ids)
    assert locked.test_set == "locked"
    own = Eval.model_validate({"head": "positive"})
    assert {split_of(prompt.id) for prompt in own.test_prompts()} == {"test"}
    assert own.test_set == "project"


def test_a_file_of_prompts_beside_the_locked_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="prompts: --split locked has its own"):
        Eval.model_validate({"head": "positive", "split": "locked", "prompts": tmp_path / "prompts.jsonl"})


def test_the_quick_study_is_small_but_for_what_was_given() -> None:
    quick = Quality.model_validate({"head": "positive", "quick": True, "num_samples": 1})
    assert (len(quick.test_prompts()), quick.num_samples, quick.test_set) == (40, 1, "project")
    assert [method.name for method in quick.rivals()] == ["prompting", "static-vector"]
    assert list(quick.factors) == []
    assert len(Quality.model_validate({"head": "positive"}).factors) > 0


@pytest.mark.parametrize(("flags", "field"), [({"update_card": True}, "update_card"), ({"study": "map"}, "quick")])
def test_what_does_not_go_with_a_quick_study_is_refused(flags: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field}: "):
        Quality.model_validate({"head": "positive", "quick": True, **flags})
