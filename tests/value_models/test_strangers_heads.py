"""Heads and cards from strangers: nothing in them runs, fills memory, or gets past HeadFileError."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.conftest import random_head, random_linear_head, write_heads
from value_models.errors import HeadFileError, RewardError
from value_models.head_folder import LocalHeads
from value_models.heads import MAX_UNITS
from value_models.rewards import check_built_in, load_reward
from value_models.store import (
    CARD_FILE,
    HEAD_FILE,
    MAX_CARD_BYTES,
    MAX_HEAD_BYTES,
    load_card,
    load_head,
    shipped_heads_folder,
)

HIDDEN = 8
GOOD = {
    "mean_D": torch.zeros(HIDDEN), "scale_D": torch.ones(HIDDEN), "inputs_UD": torch.ones(1, HIDDEN),
    "input_bias_U": torch.zeros(1), "ascent_UD": torch.ones(1, HIDDEN), "reward": torch.tensor([0.0, 1.0]),
}  # fmt: skip
MALFORMED: dict[str, dict[str, Any]] = {
    "one dimension": {"inputs_UD": torch.ones(HIDDEN)},
    "no dimension": {"inputs_UD": torch.tensor(1.0)},
    "no units": {"inputs_UD": torch.ones(0, HIDDEN), "ascent_UD": torch.ones(0, HIDDEN), "input_bias_U": torch.ones(0)},
    "three dimensions": {"ascent_UD": torch.ones(1, 1, HIDDEN)},
    "a reward of one number": {"reward": torch.tensor([1.0])},
    "a reward of none": {"reward": torch.tensor([])},
    "whole numbers": {"mean_D": torch.zeros(HIDDEN, dtype=torch.int64)},
    "eight bits": {"mean_D": torch.zeros(HIDDEN).to(torch.float8_e4m3fn)},
    "truth values": {"mean_D": torch.zeros(HIDDEN, dtype=torch.bool)},
    "a tensor too many": {"more": torch.zeros(1)},
}


def written(folder: Path, data: bytes, **card: Any) -> Path:
    """A head of these bytes, with a card that is right about them."""
    write_heads(folder, {"head": random_linear_head(1)}, {"name": "tiny", "hidden_size": 64})
    (folder / "head" / HEAD_FILE).write_bytes(data)
    path = folder / "head" / CARD_FILE
    digest = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensors_sha256": digest, **card}))
    return folder / "head"


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_tensors_are_refused_in_one_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(HeadFileError, match="cannot be loaded"):
        load_head(written(tmp_path, save({**GOOD, **MALFORMED[kind]})))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 7, b"\xff" * 64, (2**40).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"[]",
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
    ],
)  # fmt: skip
def test_what_is_no_file_of_tensors_is_refused_before_it_is_read(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(HeadFileError, match="its header"):
        load_head(written(tmp_path, data))


@pytest.mark.parametrize(("file", "limit"), [(CARD_FILE, MAX_CARD_BYTES), (HEAD_FILE, MAX_HEAD_BYTES)])
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, file: str, limit: int) -> None:
    folder = written(tmp_path, save(GOOD))
    with (folder / file).open("r+b") as opened:
        # It takes no room on the disk.
        opened.truncate(limit + 1)
    for read in (load_head, lambda path: LocalHeads(path.parent).load("head")):
        with pytest.raises(HeadFileError, match="is larger than"):
            read(folder)


def test_units_are_bounded(tmp_path: Path) -> None:
    many = {name: torch.ones(MAX_UNITS + 1, 1) for name in ("inputs_UD", "ascent_UD")}
    small = {name: torch.ones(1) for name in ("mean_D", "scale_D")}
    with pytest.raises(HeadFileError, match="at most 8192"):
        load_head(written(tmp_path, save({**GOOD, **many, **small, "input_bias_U": torch.ones(MAX_UNITS + 1)})))


def test_a_card_that_hides_how_many_units_a_head_has_is_refused(tmp_path: Path) -> None:
    three = {name: torch.ones(3, HIDDEN) for name in ("inputs_UD", "ascent_UD")} | {"input_bias_U": torch.zeros(3)}
    folder = written(tmp_path, save({**GOOD, **three}))
    card = json.loads((folder / CARD_FILE).read_text())
    card["architecture"]["type"], card["base_model"]["hidden_size"] = "field", HIDDEN
    (folder / CARD_FILE).write_text(json.dumps(card))
    with pytest.raises(HeadFileError, match="has 3 units, but its card says 1"):
        load_head(folder)


def test_every_head_of_this_project_is_within_the_limits(tmp_path: Path) -> None:
    folder = write_heads(tmp_path, {"deep": random_head(1, widths=(16, 12))}, {"name": "tiny", "hidden_size": 32})
    assert load_head(folder / "deep")[1] == load_card(folder / "deep")


@pytest.mark.parametrize("name", ["heads.kind.payload:score", "os:system", "hf:some/model", "hf:/tmp/x", "nobody"])
def test_a_cards_reward_is_only_loaded_if_it_is_built_in(name: str) -> None:
    with pytest.raises(RewardError, match="--reward"):
        check_built_in(name, "the card of kind")
    assert check_built_in("plain", "the card of kind") == "plain"
    assert load_reward("plain")


@pytest.mark.parametrize("name", ["../../x", "/etc", "..", "a/../../b", "a\\b", "x\0y", "", ".", "~root"])
def test_a_models_name_never_leads_out_of_the_shipped_heads(name: str) -> None:
    root = shipped_heads_folder("SmolLM2-135M-Instruct").parent
    folder = shipped_heads_folder(name)
    assert folder.parent == root
    assert folder.resolve().parent == root.resolve()
