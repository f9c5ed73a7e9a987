"""`recontrol score`, and what it shares with `recontrol train`: reading the user's pairs and texts with the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from server.cli.command import ModelCommand
from server.control.registry import HeadRegistry
from server.engines.embedded.given_texts import EngineTextSource
from server.errors import ConfigurationError
from value_models.given_texts import GivenTexts, read_pairs, read_texts
from value_models.rollouts import RolloutSet
from value_models.scored_texts import ScoreSettings, run_manifest, score_texts
from value_models.store import BaseModelCard

_SCORED = Path("runs/scored")
_ONLY_WITH_TEXTS = ("good_label", "plain_as_chat", "ignore_fields", "max_tokens", "cut_long")


class GivenTextsCommand(ModelCommand):
    """A command that may read texts of the user's."""

    pairs: Path | None = Field(
        None, description="JSON lines or parquet of chosen and rejected responses, with their prompt or messages"
    )
    texts: Path | None = Field(None, description="JSON lines or parquet of texts, with a label or a score each")
    good_label: str | None = Field(None, description="of --texts: which of two labels is wanted")
    plain_as_chat: bool = Field(False, description="prompts in plain text go through the chat template, as a user's")
    ignore_fields: list[str] = Field([], description="comma-separated fields of the lines to leave out")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of a given response; by default as many as the model has room for"
    )
    cut_long: bool = Field(False, description="cut given responses that are longer; without it they are refused")

    @model_validator(mode="after")
    def _with_a_file(self) -> Self:
        if self.good_label is not None and self.texts is None and self.pairs is not None:
            raise ValueError("good_label: pairs have no labels; it goes with --texts")
        if self.pairs is None and self.texts is None:
            self.refuse_without("--pairs or --texts", _ONLY_WITH_TEXTS)
        return self

    def read_given(self) -> list[GivenTexts]:
        """What --pairs and --texts name. Raises TextsFileError, MissingPackageError."""
        found: list[GivenTexts] = []
        if self.pairs is not None:
            found.append(read_pairs(self.pairs, as_chat=self.plain_as_chat, ignore=self.ignore_fields))
        if self.texts is not None:
            found.append(
                read_texts(
                    self.texts, good_label=self.good_label, as_chat=self.plain_as_chat, ignore=self.ignore_fields
                )
            )
        return found

    def score(
        self,
        given: Sequence[GivenTexts],
        folder: Path | None,
        *,
        seed: int,
        base_model: BaseModelCard | None = None,
    ) -> list[RolloutSet]:
        """Read the texts of each file into a run; without a folder into one of its own below runs/scored.

        `base_model`, if given, is the one that rollouts beside them are of. Raises TextsFileError, RolloutError,
        ModelLoadError, ConfigurationError.
        """
        loaded = self.load()
        if base_model is not None and (differences := base_model.differences(loaded.identity)):
            raise ConfigurationError(f"model: the rollouts are of another one ({differences[0]}); name it with --model")
        source = EngineTextSource(loaded, self.core(loaded, HeadRegistry({})))
        settings = ScoreSettings(max_tokens=self.max_tokens, cut_long=self.cut_long, seed=seed)
        for texts in given:
            # Of all files, before anything is written of one.
            source.check(texts, settings)
        runs: list[RolloutSet] = []
        for texts in given:
            manifest = json.dumps(run_manifest(source, texts, settings), sort_keys=True)
            own = _SCORED / hashlib.sha256(manifest.encode()).hexdigest()[:16]
            runs.append(score_texts(source, texts, folder or own, settings, show_progress=True))
        return runs


class Score(GivenTextsCommand):
    """Read pairs or texts with the model and keep the states behind their tokens; goes on where a killed run stopped.

    `recontrol train --rollouts FOLDER` fits a head to them, and `recontrol train --pairs FILE` does both at once.
    """

    out: Path | None = Field(None, description="folder of the run; by default one of its own below runs/scored")
    seed: int = Field(0, description="of the tokens that the model draws beside those of the texts")

    def cli_cmd(self) -> None:
        if self.pairs is not None and self.texts is not None:
            raise ConfigurationError("texts: give either --pairs or --texts, since a run holds one kind")
        given = self.read_given()
        if not given:
            raise ConfigurationError("pairs: give --pairs FILE or --texts FILE")
        (run,) = self.score(given, self.out, seed=self.seed)
        print(f"{len(given[0].texts)} texts are in {run.folder}")
