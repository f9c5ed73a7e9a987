"""Calls of tools by the embedded engine: the grammar that holds them, special tokens that open them, and control."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

from server.calls.formats import FORMATS
from server.calls.reader import CallRules
from server.calls.structure import CallStructure
from server.engines.base import NullObserver
from server.engines.choice import Choice
from server.engines.embedded.structure import SchemaCompiler
from server.engines.segments import Segment
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from server.errors import GenerationError, InvalidRequestError
from server.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprob
from tests.conftest import EOS, Collected, byte_tokenizer, control, run

JSON_FORMATS = sorted(name for name, form in FORMATS.items() if form.frame is not None)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": json.dumps(WEATHER), "now": json.dumps(NOW)}
BERN = ("weather", {"city": "Bern", "days": 3})


def tokenizer_with(*special: str) -> Any:
    """The byte tokenizer with these special tokens."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in special], special_tokens=True)
    return tokenizer


def compiler(*special: str) -> SchemaCompiler:
    return SchemaCompiler(tokenizer_with(*special), vocab_size=258 + len(special), eos_token_ids=[EOS])


def structure(form: str, *, is_forced: bool = True, max_calls: int = 4, answer: str | None = None) -> CallStructure:
    return CallStructure(FORMATS[form].held_frame, SCHEMAS, is_forced, max_calls, answer)


def allows(compiled: SchemaCompiler, wanted: CallStructure, text: str) -> bool:
    """Whether the text may stand as a whole."""
    matcher = compiled.compile_calls(wanted).start()
    try:
        for token_id in [*compiled._tokenizer(text, add_special_tokens=False)["input_ids"], EOS]:
            matcher.advance(token_id)
    except GenerationError:
        return False
    return True


@pytest.mark.parametrize(
    "special", [(), ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>")], ids=["text", "special"]
)
@pytest.mark.parametrize("form", JSON_FORMATS)
def test_forced_calls_hold_frame_names_and_schemas(form: str, special: tuple[str, ...]) -> None:
    compiled, wanted, write = compiler(*special), structure(form), FORMATS[form].held_frame.write
    assert allows(compiled, wanted, write([BERN]))
    assert allows(compiled, wanted, write([BERN, ("now", {}), BERN]))
    for wrong in ([], [("whether", BERN[1])], [("weather", {"city": "Bern"})], [("now", {"a": 1})], [BERN] * 5):
        assert not allows(compiled, wanted, write(wrong))
    assert not allows(compiled, wanted, write([BERN]) + " and")
    assert not allows(compiled, wanted, "I will. " + write([BERN]))


def test_one_call_is_allowed_where_there_may_be_one() -> None:
    compiled, wanted, write = compiler(), structure("hermes", max_calls=1), FORMATS["hermes"].held_frame.write
    assert allows(compiled, wanted, write([BERN]))
    assert not allows(compiled, wanted, write([BERN, BERN]))


@pytest.mark.parametrize("special", [(), ("[TOOL_CALLS]", "<tool_call>")], ids=["text", "special"])
@pytest.mark.parametrize("form", JSON_FORMATS)
def test_a_text_is_free_until_a_call_begins_and_then_held(form: str, special: tuple[str, ...]) -> None:
    compiled, wanted, write = compiler(*special), structure(form, is_forced=False), FORMATS[form].held_frame.write
    assert allows(compiled, wanted, "No {city} <tool> needed.")
    assert allows(compiled, wanted, write([BERN]))
    assert not allows(compiled, wanted, write([("weather", {"city": "Bern"})]))
    if form != "llama":
        assert allows(compiled, wanted, f"I look.\n{write([BERN])}")
        assert not allows(compiled, wanted, f"I look.\n{write([('whether', {})])}")


def test_an_answer_may_have_a_schema_beside_the_calls() -> None:
    compiled, write = compiler(), FORMATS["hermes"].held_frame.write
    wanted = structure("hermes", is_forced=False, answer=json.dumps({"enum": ["yes", "no"]}))
    assert allows(compiled, wanted, '"yes"')
    assert allows(compiled, wanted, write([BERN]))
    assert not allows(compiled, wanted, "maybe")


def test_a_schema_that_does_not_compile_is_refused() -> None:
    broken = CallStructure(FORMATS["hermes"].held_frame, {"f": '{"type": "object", "required": 3}'}, True, 1)
    with pytest.raises(InvalidRequestError):
        compiler().compile_calls(broken)


def calling(core: Any, form: str, **fields: Any) -> GenerationRequest:
    rules = CallRules(FORMATS[form], {"weather": WEATHER, "now": NOW}, is_held=True, max_calls=2)
    compiled = SchemaCompiler(core._tokenizer, vocab_size=core.vocab_size, eos_token_ids=[EOS])
    return GenerationRequest(
        "a", (5, 6, 7), calls=rules, structure=compiled.compile_calls(structure(form, max_calls=2)), **fields
    )


def told(collected: Collected) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for delta in (delta for chunk in collected.chunks for delta in chunk.calls):
        if delta.name is not None:
            calls.append((delta.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return calls


STEERED = control({"good": 1.0}, step_size=2.0)
IN_CALLS = STEERED.model_copy(update={"in_calls": True})


def forced(core: Any, seed: int, **fields: Any) -> Collected:
    return run(core, [calling(core, "hermes", sampling=SamplingParams(max_tokens=250, seed=seed), **fields)])["a", 0]


@pytest.mark.parametrize("steered", [None, STEERED, IN_CALLS], ids=["plain", "steered", "in calls"])
def test_forced_calls_of_a_random_model_parse_whatever_steers_it(make_core: Callable[..., Any], steered: Any) -> None:
    core = make_core()
    for seed in range(3):
        done = forced(core, seed, control=steered)
        assert done.finish_reasons == [FinishReason.STOP]
        assert done.text == ""
        for name, arguments in told(done):
            assert set(json.loads(arguments)) == {"weather": {"city", "days"}, "now": set()}[name]


def test_control_leaves_calls_alone_unless_it_is_told_not_to(make_core: Callable[..., Any]) -> None:
    core = make_core()
    plain, steered, in_calls = (forced(core, 1, control=how) for how in (None, STEERED, IN_CALLS))
    assert steered.token_ids == plain.token_ids
    last, other_last = steered.chunks[-1].control, in_calls.chunks[-1].control
    assert last is not None
    assert last.controlled_share == 0
    assert other_last is not None
    assert other_last.controlled_share > 0.5
    assert {chunk.segment for chunk in steered.chunks} == {Segment.CALL}


def grown(
    text: str, *special: str, form: str, stop: tuple[str, ...] = ()
) -> tuple[str, list[tuple[str, str]], list[str]]:
    """The text, the calls and the tokens' names of a choice whose tokens spell this, with these special ones."""
    tokenizer = tokenizer_with(*special)
    request = GenerationRequest(
        "r", (1,), SamplingParams(max_tokens=200, logprobs=0, stop=stop), calls=CallRules(FORMATS[form], {"now": None})
    )
    detokenizer = Detokenizer(Vocabulary(tokenizer.backend_tokenizer), (1,))
    choice = Choice.of(request, 0, detokenizer=detokenizer, eos_token_ids=[EOS], observer=NullObserver())
    collected = Collected()
    for token_id in [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]:
        collected.add(choice.grow(token_id, None, logprob=TokenLogprob(token_id, "", -1.0)))
        if collected.finish_reasons:
            break
    names = [score.text for chunk in collected.chunks for score in chunk.logprobs]
    return collected.text, told(collected), names


def test_special_tokens_that_open_calls_reach_the_reader_and_their_names_stay() -> None:
    special = ("[TOOL_CALLS]", "[ARGS]", "<other>")
    text, calls, names = grown("Hi<other>[TOOL_CALLS]now[ARGS]{}", *special, form="mistral-args")
    assert (text, calls) == ("Hi", [("now", "{}")])
    assert names[:-1] == ["H", "i", "<other>", "[TOOL_CALLS]", "n", "o", "w", "[ARGS]", "{", "}"]


def test_a_special_token_that_opens_calls_still_stops_a_text() -> None:
    text, calls, _ = grown("Hi[TOOL_CALLS]now[ARGS]{}", "[TOOL_CALLS]", "[ARGS]", form="mistral-args", stop=("[ARGS]",))
    assert (text, calls) == ("Hi[TOOL_CALLS]now", [])


def test_bytes_that_are_open_before_a_special_token_are_not_lost() -> None:
    tokenizer = tokenizer_with("[TOOL_CALLS]")
    request = GenerationRequest(
        "r", (1,), SamplingParams(max_tokens=9), calls=CallRules(FORMATS["mistral"], {"now": None})
    )
    detokenizer = Detokenizer(Vocabulary(tokenizer.backend_tokenizer), (1,))
    choice = Choice.of(request, 0, detokenizer=detokenizer, eos_token_ids=[EOS], observer=NullObserver())
    first_byte, *_ = tokenizer("ä", add_special_tokens=False)["input_ids"]
    chunks = [choice.grow(token_id, None) for token_id in (first_byte, tokenizer.convert_tokens_to_ids("[TOOL_CALLS]"))]
    assert "".join(chunk.text for chunk in chunks) == "\ufffd"
