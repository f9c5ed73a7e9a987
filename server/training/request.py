"""What a job is asked for, as JSON: the flags of `recontrol train` as fields, and lists in place of files.

Enter at `HeadRequest`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from server.field_errors import field_error
from server.training.recipe import FromInstruction, FromTexts, Recipe
from server.unicode import check_text
from value_models.ascent import Metric
from value_models.distillation import MIN_PROMPTS, DistilSettings, chat_prompts, check_instructions
from value_models.given_texts import pairs_of, texts_of
from value_models.lines import FieldOrigin, given_records
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file
from value_models.scored_texts import ScoreSettings
from value_models.store import NAME_PATTERN
from value_models.training import TrainSettings

MAX_TEXTS = 10_000
MAX_PROMPTS = 1000
MAX_CHARS = 4000
"""Of a sentence, a prompt or a description."""
_ONLY_WITH = {
    "good_label": ("texts",),
    **dict.fromkeys(("plain_as_chat", "ignore_fields", "max_tokens", "cut_long"), ("pairs", "texts")),
    **dict.fromkeys(("metric", "shrinkage", "center_by_prompt"), ("pairs", "texts")),
    **dict.fromkeys(("contrast", "prompts", "instruction_prompts", "instruction_tokens"), ("instruction",)),
}
"""Fields that say nothing without one of others."""
_SOURCES = ("pairs", "texts", "instruction")
_Text = Annotated[str, AfterValidator(check_text)]
_Sentence = Annotated[_Text, Field(max_length=MAX_CHARS)]
_Word = Annotated[_Text, Field(max_length=256)]
_Prompt = Annotated[_Sentence, Field(min_length=1)]
_Items = Annotated[list[Any], Field(min_length=1, max_length=MAX_TEXTS)]


class HeadRequest(BaseModel):
    """What `recontrol train` takes, by the same names; null means the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: _Sentence | None = None
    replace: bool | None = None
    """Whether a head of that name may be there already."""
    pairs: _Items | None = None
    texts: _Items | None = None
    instruction: _Sentence | None = None
    good_label: _Word | None = None
    plain_as_chat: bool | None = None
    ignore_fields: Annotated[list[_Word], Field(max_length=64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    cut_long: bool | None = None
    metric: Metric | None = None
    shrinkage: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    center_by_prompt: bool | None = None
    contrast: _Sentence | None = None
    prompts: Annotated[list[_Prompt], Field(min_length=MIN_PROMPTS, max_length=MAX_PROMPTS)] | None = None
    """What a user might ask; by default the project's own."""
    instruction_prompts: Annotated[int, Field(ge=MIN_PROMPTS, le=MAX_PROMPTS)] | None = None
    instruction_tokens: Annotated[int, Field(ge=1, le=256)] | None = None
    damping: Annotated[FiniteFloat, Field(ge=0)] | None = None
    ridge: Annotated[FiniteFloat, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> HeadRequest:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if not given:
            raise field_error("instruction", "give one of pairs, texts and instruction")
        if len(given) > 1:
            raise field_error(given[1], f"{given[0]} is given already; a head is made of one of them")
        for name, partners in _ONLY_WITH.items():
            if getattr(self, name) is not None and given[0] not in partners:
                raise field_error(name, f"goes with {' or '.join(partners)} alone")
        return self

    def recipe(self) -> Recipe:
        """Raises TextsFileError, InstructionError."""
        source = self._from_texts() if self.instruction is None else self._from_instruction(self.instruction)
        return Recipe(self.name, self.description or "", bool(self.replace), source)

    def _from_texts(self) -> FromTexts:
        forms = {"as_chat": bool(self.plain_as_chat), "ignore": self.ignore_fields or []}
        if self.pairs is not None:
            origin = FieldOrigin("pairs")
            given = pairs_of(given_records(self.pairs, origin), origin, **forms)
        else:
            origin = FieldOrigin("texts")
            records = given_records(self.texts or [], origin)
            given = texts_of(records, origin, good_label=self.good_label, **forms)
        score = ScoreSettings(**self._given("max_tokens", "cut_long", "seed"))
        train = TrainSettings(**self._given("center_by_prompt", "metric", "shrinkage", "damping", "ridge", "seed"))
        given.check_spread(is_centred=train.centres(given.kind))
        return FromTexts(given, score, train)

    def _from_instruction(self, instruction: str) -> FromInstruction:
        check_instructions(instruction, self.contrast)
        sizes = {"max_prompts": self.instruction_prompts, "max_tokens": self.instruction_tokens}
        settings = DistilSettings(
            **{name: size for name, size in sizes.items() if size is not None},
            **self._given("damping", "ridge", "seed"),
        )
        prompts = tuple(self._prompts())
        chat_prompts(prompts, settings)
        return FromInstruction(instruction, self.contrast, prompts, settings)

    def _prompts(self) -> Iterator[RolloutPrompt]:
        if self.prompts is None:
            yield from (prompt for prompt in load_prompts(own_prompts_file()) if prompt.format == "chat")
        for index, text in enumerate(self.prompts or []):
            yield RolloutPrompt(id=f"prompts.{index}", prompt=text)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}
