"""Tools, calls and their answers in a model's own template, and as plain messages where it has no place for them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from server.calls.formats import FORMATS
from server.calls.reader import CallRules
from server.engines.chat_template import call_format_of, encode_chat, takes_tools
from server.errors import InvalidRequestError
from server.settings import Settings
from server.types import ChatRendering
from tests.conftest import byte_tokenizer

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
SYSTEM, HI = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "4", "tool_call_id": "call_1", "name": "add"}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen 2.5's, in short.
QWEN = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}</>'
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}[TOOL_CALLS]{{ c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(template: str, *messages: Any, tools: tuple[Any, ...] = (), form: str | None = None) -> str:
    tokenizer = tokenizer_with(template)
    call_format = FORMATS[form] if form else call_format_of(tokenizer)
    return tokenizer.decode(encode_chat(tokenizer, messages, ChatRendering(tools=tools), call_format))


def test_tools_calls_and_answers_go_through_a_template_that_has_a_place_for_them() -> None:
    text = rendered(QWEN, HI, CALLED, ANSWER, tools=(TOOL,))
    assert text == (
        '<tools>add</tools><user>hi</><assistant><tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call></>'
        "<tool>4</><assistant>"
    )


def test_a_template_without_a_place_for_tools_is_told_of_them_in_the_system_message() -> None:
    text = rendered(CHATML, SYSTEM, HI, tools=(TOOL,))
    assert text.startswith("<system>be brief\n\nYou can call these functions")
    assert '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}' in text
    assert text.endswith("</><user>hi</><assistant>")
    assert rendered(CHATML, HI, tools=(TOOL,)).startswith("<system>You can call these functions")


def test_a_template_without_system_messages_is_told_in_the_users_first() -> None:
    text = rendered(NO_SYSTEM, HI, tools=(TOOL,))
    assert text.startswith("<user>You can call these functions")
    assert text.endswith("\n\nhi</><assistant>")


def test_without_a_place_for_them_calls_are_the_assistants_text_and_answers_the_users() -> None:
    text = rendered(CHATML, HI, CALLED, ANSWER, {**ANSWER, "content": "5"})
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    answers = "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    assert text == f"<user>hi</><assistant>{written}</><user>{answers}</><assistant>"


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_model_is_told_to_write_is_what_is_read(form: str) -> None:
    text = rendered(CHATML, HI, tools=(TOOL,), form=form)
    example = text.partition("once for each call:\n")[2].partition("\nWhat it gives")[0]
    reader = CallRules(FORMATS[form], {"function_name": None}).reader()
    told = [*reader.add(example)[1], *reader.end()[1]]
    assert [delta.name for delta in told if delta.name] == ["function_name"]


def test_ids_that_mistrals_templates_refuse_become_ones_that_they_take() -> None:
    text = rendered(MISTRAL, HI, CALLED, ANSWER, tools=(TOOL,))
    made = text.removeprefix("[AVAILABLE_TOOLS][TOOL_CALLS]")
    assert made == made[:9] * 2
    assert made.isalnum()
    own = {**CALLED, "tool_calls": [{**CALL, "id": "abcdefghi"}]}
    assert rendered(MISTRAL, HI, own, {**ANSWER, "tool_call_id": "abcdefghi"}).endswith(
        "[TOOL_CALLS]abcdefghiabcdefghi"
    )


def test_what_a_template_refuses_of_calls_is_told_in_its_words() -> None:
    single = (
        QWEN + "{% for m in messages %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    )
    with pytest.raises(InvalidRequestError, match=r"refuses them \(one call\)"):
        rendered(single + "{% endfor %}", HI, {**CALLED, "tool_calls": [CALL, CALL]}, tools=(TOOL,))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHATML, "hermes"),
        (QWEN, "hermes"),
        (QWEN + "{# <tool_call><function= #}", "qwen-xml"),
        (MISTRAL, "mistral"),
        (MISTRAL + "{# [ARGS] #}", "mistral-args"),
        ("{% if tools %}{{ tools }}{% endif %}{# {\"name\": \"f\", \"parameters\": {}} #}", "llama"),
        ("{% if tools %}{{ tools }}{% endif %}<start_function_call>", "functiongemma"),
        ("{% if tools %}{{ tools }}{% endif %}<|tool_call>", "gemma4"),
        ("{% if tools %}{{ tools }}{% endif %}<|python_start|>", "pythonic"),
        (CHATML.replace("<", "<start_of_turn>"), "gemma"),
        ("{% if tools %}{{ tools }}{% endif %}<|tool▁calls▁begin|>", None),
        (QWEN + "{# <tool_call>f<arg_key>a</arg_key> #}", None),
    ],
)  # fmt: skip
def test_the_form_of_calls_is_found_from_the_template(template: str, form: str | None) -> None:
    found = call_format_of(tokenizer_with(template))
    assert (found.name if found else None) == form


def test_a_setting_names_the_form_of_calls() -> None:
    assert set(get_args(Settings.model_fields["tool_call_format"].annotation)) == {"auto", *FORMATS}
    assert call_format_of(tokenizer_with(QWEN), "llama") is FORMATS["llama"]


def test_whether_a_template_takes_tools_is_what_it_renders() -> None:
    assert takes_tools(tokenizer_with(QWEN))
    assert not takes_tools(tokenizer_with(CHATML))
    assert not takes_tools(tokenizer_with("{% if tools %}{% endif %}" + CHATML))
    assert not takes_tools(tokenizer_with("{% if %}"))
    # One that refuses a single message is asked what it reads.
    assert takes_tools(tokenizer_with("{{ raise_exception('no') }}{{ tools }}"))
    assert not takes_tools(byte_tokenizer_without_template())


def byte_tokenizer_without_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer
