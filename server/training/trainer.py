"""The work of one job, from a recipe to a head in the heads' folder, in a thread of low priority.

Texts are read in the engine's spare rows; what is fitted to them is fitted here, by the code that the command line
runs, so that both make the same head of the same texts. Knows nothing of queues or HTTP. Enter at `train_and_save`;
`check_recipe` finds most of what is wrong beforehand.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from server.engines.base import Engine, TrainingSources
from server.errors import HeadConflictError, ReadOnlyHeadsError
from server.training.control import JobControl
from server.training.recipe import FromInstruction, FromTexts, Recipe
from value_models.cards import SourcePart, distilled_card, trained_card
from value_models.distillation import InstructedSource, InstructedText, OutputLayer, distil_head, read_texts
from value_models.errors import HeadFileError, TrainingDataError
from value_models.given_texts import GivenText, GivenTexts
from value_models.head_folder import LocalHeads, is_url, open_heads
from value_models.heads import ValueHead
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import Rollout, RolloutSettings
from value_models.scored_texts import ScoreSettings, TextSource, score_texts
from value_models.store import CARD_FILE, HEAD_FILE, HeadCard, save_head
from value_models.training import train_head
from value_models.training_data import load_scored_texts

COMMAND = "POST /v1/heads"
"""What the card says that made the head."""
MAX_STATE_BYTES = 2 * 2**30
"""Of the states and gradients of all texts of a job."""
_Source = TypeVar("_Source", TextSource, InstructedSource)
_NICENESS = 10
"""By which a job's thread, and those that compute for it, give way to requests where cores are few."""


def check_recipe(engine: Engine, recipe: Recipe) -> None:
    """Find what would fail once the job's turn comes. It takes as long as to tokenize all texts.

    Raises UnsupportedFieldError, ReadOnlyHeadsError, HeadConflictError, TextsFileError.
    """
    sources = engine.training_sources(lambda: None)
    _check_place(sources.heads_location, recipe)
    if isinstance(recipe.source, FromTexts):
        sources.texts.check(recipe.source.given, recipe.source.score)


def train_and_save(engine: Engine, recipe: Recipe, control: JobControl) -> HeadCard:
    """Train the head and write it where the engine loads heads from; its card.

    Raises RecontrolError and ValueModelError for what is wrong with the texts, JobCancelledError soon after
    `control.cancel`.
    """
    _give_way()
    control.enter("reading")
    sources = engine.training_sources(control.check)
    try:
        with tempfile.TemporaryDirectory(prefix="recontrol-job-") as scratch:
            head, card = _trained(sources, recipe, control, Path(scratch))
            control.enter("saving")
            _check_place(sources.heads_location, recipe)
            return _saved(sources.heads_location, head, card, Path(scratch))
    finally:
        sources.close()


def _trained(
    sources: TrainingSources, recipe: Recipe, control: JobControl, scratch: Path
) -> tuple[ValueHead, HeadCard]:
    made = recipe.source
    if isinstance(made, FromInstruction):
        source = _Instructed(sources.instructed, control)
        texts = read_texts(source, made.prompts, made.instruction, made.contrast, made.settings)
        control.enter("fitting")
        distilled = distil_head(texts, source.output, made.settings)
        card = distilled_card(
            recipe.name, recipe.description, source.base_model, texts, made.settings, distilled,
            instruction=made.instruction, contrast=made.contrast, command=COMMAND,
        )  # fmt: skip
        return distilled.head, card
    run = score_texts(_Texts(sources.texts, control), made.given, scratch / "texts", made.score, show_progress=False)
    control.enter("fitting")
    data = load_scored_texts(run.folder)
    trained = train_head([data], made.train)
    control.check()
    parts = [SourcePart(data, 1.0, trained.figures[0])]
    card = trained_card(recipe.name, trained.head, parts, made.train, description=recipe.description, command=COMMAND)
    return trained.head, card


def _saved(location: str | Path, head: ValueHead, card: HeadCard, scratch: Path) -> HeadCard:
    """The card as it was written. Raises HeadFileError, ReadOnlyHeadsError."""
    folder = scratch / "heads" if is_url(location) else Path(location)
    try:
        save_head(folder / card.name, head, card)
    except OSError as error:
        raise _read_only(location, error) from error
    if is_url(location):
        open_heads(location).publish(card.name, LocalHeads(folder))
    return LocalHeads(folder).card(card.name)


def _check_place(location: str | Path, recipe: Recipe) -> None:
    """Raises ReadOnlyHeadsError, and HeadConflictError for what is there by that name, loaded or not.

    Whether a store can be written shows only when it is.
    """
    if not is_url(location):
        try:
            Path(location).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=location):
                pass
        except OSError as error:
            raise _read_only(location, error) from error
        _check_is_free(Path(location) / recipe.name)
    try:
        names = open_heads(location).names()
    except HeadFileError as error:
        raise ReadOnlyHeadsError(f"heads_dir: {error}") from error
    if recipe.name in names and not recipe.replaces:
        raise HeadConflictError(
            f"name: there is a value head {recipe.name!r}; choose another name, or replace it", param="name"
        )


def _check_is_free(folder: Path) -> None:
    """Raises HeadConflictError where a head's files cannot lie in the folder, or would lie elsewhere."""
    if folder.is_symlink():
        raise HeadConflictError(
            f"name: {folder} is a symbolic link, and a job writes through none; choose another name, or remove it",
            param="name",
        )
    if folder.exists() and not folder.is_dir():
        raise HeadConflictError(
            f"name: a file of the name {folder.name!r} is in the way in the heads' folder; choose another name, or "
            "remove it",
            param="name",
        )
    for path in (folder / HEAD_FILE, folder / CARD_FILE):
        if path.is_dir():
            raise HeadConflictError(f"name: {path} is a folder, and a file of the head is to be there", param="name")


def _read_only(location: str | Path, error: OSError) -> ReadOnlyHeadsError:
    return ReadOnlyHeadsError(
        f"heads_dir: {location} cannot be written ({error.strerror or error}); start the server with a --heads-dir "
        "that can"
    )


def _give_way() -> None:
    """Only Linux knows threads by priority; the threads that this one starts have its own."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class _Room:
    """Counts what a job holds in memory."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def take(self, *tensors: Tensor | None) -> None:
        """Raises TrainingDataError."""
        self._num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if self._num_bytes > MAX_STATE_BYTES:
            raise TrainingDataError(
                f"The states of these texts take more than {MAX_STATE_BYTES / 2**30:g} GiB, which is what a job may "
                "hold; give fewer or shorter texts, or use `recontrol train`"
            )


class _Watched(Generic[_Source]):
    """A source that tells the job how far it is, and ends with it."""

    def __init__(self, source: _Source, control: JobControl) -> None:
        self._source = source
        self._control = control
        self._room = _Room()

    @property
    def base_model(self) -> dict[str, Any]:
        return self._source.base_model

    def _read(self, *held: Tensor | None) -> None:
        """One text more, which leaves these in memory. Raises JobCancelledError, TrainingDataError."""
        self._control.check()
        self._room.take(*held)
        self._control.count()


class _Texts(_Watched[TextSource]):
    def check(self, given: GivenTexts, settings: ScoreSettings) -> None:
        self._source.check(given, settings)

    def score(self, texts: Sequence[GivenText], settings: ScoreSettings) -> Iterator[Rollout]:
        for rollout in self._source.score(texts, settings):
            self._read(rollout.states_TD, rollout.logp_grads_TD, rollout.sampled_grads_TD)
            yield rollout


class _Instructed(_Watched[InstructedSource]):
    @property
    def output(self) -> OutputLayer:
        return self._source.output

    def texts(
        self, prompts: Sequence[RolloutPrompt], instruction: str, contrast: str | None, settings: RolloutSettings
    ) -> Iterator[InstructedText]:
        for text in self._source.texts(prompts, instruction, contrast, settings):
            self._read(text.bare_TD, text.instructed_TD, text.contrasted_TD)
            yield text
