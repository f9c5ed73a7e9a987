"""Calls read out of texts, in every form that is known and however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.calls.calls import MAX_CALLS, CallDelta
from server.calls.formats import FORMATS
from server.calls.reader import CallRules

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: dict[str, Any] = {"weather": WEATHER, "now": None}
BERN: tuple[str, dict[str, Any]] = ("weather", {"city": "Bern", "days": 3})
NOW: tuple[str, dict[str, Any]] = ("now", {})
ONE = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 3}}\n</tool_call>',
    "qwen-xml": "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "weather", "parameters": {"city": "Bern", "days": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern", "days": 3}}]',
    "mistral-args": '[TOOL_CALLS]weather[ARGS]{"city": "Bern", "days": 3}',
    "pythonic": "[weather(city='Bern', days=3)]",
    "smollm-python": "<code>\nweather(city='Bern', days=3)\n</code>",
    "gemma": '```tool_code\nprint(weather(city="Bern", days=3))\n```',
    "functiongemma": "<start_function_call>call:weather{city:<escape>Bern<escape>,days:3}<end_function_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:3}<tool_call|>',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen-xml": ONE["qwen-xml"] + "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "llama": "<|python_tag|>" + ONE["llama"] + '; {"name": "now", "parameters": {}}',
    "mistral": ONE["mistral"][:-1] + ', {"name": "now"}]',
    "mistral-args": ONE["mistral-args"] + "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}",
    "pythonic": "<|python_start|>" + ONE["pythonic"][:-1] + ", now()]<|python_end|>",
    "smollm-python": "<code>weather(city='Bern', days=3)\nnow()</code>",
    "gemma": '```json\n[{"name": "weather", "parameters": {"city": "Bern", "days": 3}}, {"name": "now"}]\n```',
    "functiongemma": ONE["functiongemma"] + "<start_function_call>call:now{}<end_function_call>",
    "gemma4": ONE["gemma4"] + "<|tool_call>call:now{}<tool_call|>",
}
ANYWHERE = sorted(ONE.keys() - {"llama", "pythonic"})
"""Forms whose calls may stand behind text."""
# Made of parts of calls, so that what is nearly a call is tried too.
PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "{", "}", "[", "]", '{"name": "weather", ', '"arguments": {"city": "B\\"}"}', "; ",
     "[TOOL_CALLS]", "[ARGS]", "weather", "(", ")", "city=", "'", '"', "\n", " ", "text", "<", "```tool_code", "```",
     "<code>", "</code>", "<|python_tag|>", "call:weather{", "<start_function_call>", "<escape>", "<end_function_call>",
     "<function=weather>", "</function>", "<parameter=city>", "</parameter>", *ONE.values()]
)  # fmt: skip


def read(form: str, pieces: list[str], **rules: Any) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, by name and arguments, of a text that comes in these pieces."""
    reader = CallRules(FORMATS[form], TOOLS, **rules).reader()
    told = [*map(reader.add, pieces), reader.end()]
    calls: list[tuple[str, str]] = []
    for delta in (delta for _, deltas in told for delta in deltas):
        assert delta.index == len(calls) - (delta.name is None)
        if delta.name is not None:
            calls.append((delta.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return "".join(text for text, _ in told), calls


def values(calls: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_is_read_in_every_form(form: str) -> None:
    text, calls = read(form, [ONE[form]])
    assert (text, values(calls)) == ("", [BERN])


@pytest.mark.parametrize("form", FORMATS)
def test_several_calls_are_read_in_every_form(form: str) -> None:
    text, calls = read(form, [TWO[form]])
    assert (text, values(calls)) == ("", [BERN, NOW])


@pytest.mark.parametrize("form", FORMATS)
def test_where_one_call_is_allowed_the_first_is_told_and_the_text_ends(form: str) -> None:
    reader = CallRules(FORMATS[form], TOOLS, max_calls=1).reader()
    deltas = [*reader.add(TWO[form])[1], *reader.end()[1]]
    assert [delta.name for delta in deltas if delta.name] == ["weather"]
    assert reader.is_full


@pytest.mark.parametrize("form", ANYWHERE)
def test_text_before_and_behind_a_call_is_text_without_the_white_space_between(form: str) -> None:
    text, calls = read(form, list(f"I look.\n\n{ONE[form]}\n Done. "))
    assert (text, values(calls)) == ("I look.Done. ", [BERN])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("text", ["", " ", "Hello <b>you</b> [1], {2}; a' \"b ", "\n\nHi\n", "a < b ``` c [TOOL"])
def test_a_text_without_calls_stays_as_it_is(form: str, text: str) -> None:
    assert read(form, list(text)) == (text, [])


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_of_a_tool_that_there_is_not_stays_text(form: str) -> None:
    wrong = ONE[form].replace("weather", "whether")
    assert read(form, list(wrong)) == (wrong, [])


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_that_breaks_off_stays_text(form: str) -> None:
    # What only its closing mark lacks is whole.
    cut = ONE[form][: ONE[form].rindex("3")]
    assert read(form, list(cut)) == (cut, [])


@pytest.mark.parametrize("form", ["hermes", "functiongemma", "gemma4", "smollm-python", "gemma"])
def test_a_call_without_its_closing_mark_is_a_call(form: str) -> None:
    whole = ONE[form]
    cut = whole[: max(whole.rfind(mark) for mark in ("</", "<end", "<tool_call|", "\n```"))]
    assert values(read(form, list(cut))[1]) == [BERN]


@pytest.mark.parametrize(
    "wrong",
    [
        '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>',
        '<tool_call>{"name": ["weather"]}</tool_call>',
        "<tool_call>weather</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>" + '{"a":' * 5000 + "</tool_call>",
    ],
)
def test_a_malformed_call_stays_text_and_the_one_behind_it_is_read(wrong: str) -> None:
    text, calls = read("hermes", list(wrong + ONE["hermes"]))
    assert (text, values(calls)) == (wrong, [BERN])


@pytest.mark.parametrize(
    "body",
    ["weather(city=open('x'))", "weather(**x)", "weather('Bern')", "import os", "weather(city=1j)", "x = 1", "(" * 300,
     "weather(city=f'{now}')", "lambda: 0", "weather" + ".x" * 900 + "()", "weather" + "()" * 900],
)  # fmt: skip
def test_python_that_is_no_call_with_literals_is_never_run_and_stays_text(body: str) -> None:
    text = f"<code>{body}</code>"
    assert read("smollm-python", list(text)) == (text, [])


def test_marks_within_strings_belong_to_the_arguments() -> None:
    city = '</tool_call> "}; [TOOL_CALLS]'
    body = json.dumps({"name": "weather", "arguments": {"city": city}})
    for form, text in {
        "hermes": f"<tool_call>{body}</tool_call>",
        "llama": body,
        "mistral": f"[TOOL_CALLS][{body}]",
        "gemma": f"```tool_code\nweather(city={city!r})\n```",
        "gemma4": f'<|tool_call>call:weather{{city:<|"|>{city}<|"|>}}<tool_call|>',
    }.items():
        assert values(read(form, list(text))[1]) == [("weather", {"city": city})], form


def test_bare_values_take_the_type_that_the_schema_has() -> None:
    types = {"n": "number", "s": "string", "b": "boolean"}
    properties = {name: {"type": kind} for name, kind in types.items()}
    properties |= {"o": {"anyOf": [{"type": "object"}, {"type": "null"}]}, "e": {"enum": [1, "x"]}}
    given = {"n": "2", "s": "2", "b": "True", "o": '{"a": [1]}', "e": "1", "u": "7"}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
    reader = CallRules(FORMATS["qwen-xml"], {"f": {"properties": properties}}).reader()
    _, deltas = reader.add(f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>")
    assert json.loads(deltas[1].arguments) == {"n": 2, "s": "2", "b": True, "o": {"a": [1]}, "e": 1, "u": "7"}


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"oneOf": {"a": 1}}, {"enum": 5}, {"type": 5}, {"anyOf": [5]}, 5])
def test_a_bare_value_whose_schema_is_none_is_a_string(schema: Any) -> None:
    reader = CallRules(FORMATS["qwen-xml"], {"f": {"properties": {"a": schema}}}).reader()
    _, deltas = reader.add("<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>")
    assert json.loads(deltas[1].arguments) == {"a": "5"}


def test_what_begins_to_open_a_call_is_taken_for_one_until_it_is_none() -> None:
    reader = CallRules(FORMATS["hermes"], TOOLS).reader()
    seen = [(reader.add(piece), reader.is_in_call)[1] for piece in ("Hi <", "to", "day ", "<tool_call>", "{", "x")]
    assert seen == [False, True, False, True, True, False]


def test_arguments_that_hold_half_a_character_can_be_sent() -> None:
    _, calls = read("hermes", ['<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>'])
    assert calls[0][1].encode() == b'{"a": "\\ud800"}'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text("ab <>{}[]'\"\\\nä,:", max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b_2"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(FORMATS.keys() - {"qwen-xml"})), st.dictionaries(st.sampled_from(["a", "b_2"]), JSON))
def test_what_is_written_in_a_form_is_read_in_it(form: str, arguments: dict[str, Any]) -> None:
    written = FORMATS[form].write([("weather", arguments), ("now", {})])
    text, calls = read(form, [written])
    assert (text, values(calls)) == ("", [("weather", arguments), NOW])


def test_bare_values_are_written_as_they_are_read() -> None:
    assert FORMATS["qwen-xml"].write([("weather", {"city": "Bern", "days": 3})]) == ONE["qwen-xml"]


@given(st.sampled_from(sorted(FORMATS)), st.lists(PIECES, max_size=8), st.booleans(), st.data())
def test_what_is_read_does_not_depend_on_how_the_text_is_cut(
    form: str, parts: list[str], is_held: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(form, [text], is_held=is_held)
    assert whole == read(form, pieces, is_held=is_held) == read(form, list(text), is_held=is_held)


@given(st.sampled_from(sorted(FORMATS)), st.lists(PIECES, max_size=6), st.integers(0, 40))
def test_a_copy_goes_on_by_itself(form: str, parts: list[str], cut: int) -> None:
    text = "".join(parts)
    reader = CallRules(FORMATS[form], TOOLS).reader()
    begun = reader.add(text[:cut])
    other = reader.copy()
    first = [begun, reader.add(text[cut:]), reader.end()]
    assert first == [begun, other.add(text[cut:]), other.end()]


def held(form: str, *calls: tuple[str, str]) -> str:
    return FORMATS[form].held_frame.write(calls)


@pytest.mark.parametrize("form", FORMATS)
def test_arguments_of_a_held_call_are_told_as_they_come(form: str) -> None:
    text = held(form, ("weather", '{"city": "Bern", "days": 3}'))
    reader = CallRules(FORMATS[form], TOOLS, is_held=True).reader()
    told = [reader.add(character)[1] for character in text]
    assert len([deltas for deltas in told if deltas]) == 1 + len('{"city": "Bern", "days": 3}')
    assert next(filter(None, told)) == (CallDelta(0, "weather"),)
    assert reader.end() == ("", ())


@pytest.mark.parametrize("form", FORMATS)
def test_held_calls_are_read_by_their_frame(form: str) -> None:
    text = held(form, ("weather", '{"city": "}"}'), ("now", "{}"))
    assert read(form, [text], is_held=True) == ("", [("weather", '{"city": "}"}'), ("now", "{}")])


@pytest.mark.parametrize("form", FORMATS)
def test_a_held_call_that_the_limit_cuts_keeps_the_arguments_so_far(form: str) -> None:
    text = held(form, ("weather", '{"city": "Be'))
    cut = text[: text.index('"Be') + 3]
    assert read(form, list(cut), is_held=True) == ("", [("weather", '{"city": "Be')])


@pytest.mark.parametrize("form", FORMATS)
def test_of_a_held_call_that_the_limit_cuts_before_its_name_is_whole_nothing_is_told(form: str) -> None:
    text = held(form, ("weather", "{}"))
    cuts = range(text.index("weather") + len("weather"))
    assert {cut: read(form, list(text[:cut]), is_held=True) for cut in cuts} == dict.fromkeys(cuts, ("", []))


@pytest.mark.parametrize(("num_false", "is_read"), [(100, True), (200, False)])
def test_behind_much_text_that_had_to_be_read_anew_no_call_is_looked_for(num_false: int, is_read: bool) -> None:
    """Since all behind each opening that opens no call is read once more, in the loop that all requests share."""
    text = "<code>" * num_false + ") " + "<code>f()</code>"
    reader = CallRules(FORMATS["smollm-python"], {"f": None}).reader()
    read = [reader.add(text[at : at + 6]) for at in range(0, len(text), 6)]
    assert (reader.num_calls == 1) is is_read
    if not is_read:
        assert "".join(part for part, _ in read) + reader.end()[0] == text


def test_openings_that_are_seen_at_once_to_open_no_call_do_not_end_the_search() -> None:
    reader = CallRules(FORMATS["hermes"], TOOLS).reader()
    for _ in range(5000):
        reader.add("<tool_call>x")
    reader.add(ONE["hermes"])
    assert reader.num_calls == 1


@pytest.mark.parametrize(("depth", "is_read"), [(500, True), (600, False)])
def test_arguments_that_are_nested_without_end_are_text(depth: int, is_read: bool) -> None:
    """Since what is open is copied with each token that a guardrail may take back."""
    nested = "[" * depth + "]" * depth
    text = f'<tool_call>{{"name": "now", "arguments": {{"a": {nested}}}}}</tool_call>'
    out, calls = read("hermes", list(text))
    assert bool(calls) is is_read
    assert is_read or out == text


def test_a_schema_is_read_once_for_each_name_however_often_a_text_gives_it() -> None:
    class Counted(dict[str, Any]):
        num_asked = 0

        def get(self, *args: Any) -> Any:
            self.num_asked += 1
            return super().get(*args)

    properties = Counted(a={"type": "integer"})
    inner = "".join(f"<parameter=a>\n{value}\n</parameter>\n" for value in range(100))
    reader = CallRules(FORMATS["qwen-xml"], {"f": {"properties": properties}}).reader()
    _, deltas = reader.add(f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>")
    assert (json.loads(deltas[1].arguments), properties.num_asked) == ({"a": 99}, 1)


def test_of_more_calls_than_a_text_may_hold_the_first_are_read() -> None:
    text = "; ".join(['{"name": "now", "parameters": {}}'] * (MAX_CALLS + 9))
    out, calls = read("llama", [text])
    assert (out, len(calls)) == ("", MAX_CALLS)
