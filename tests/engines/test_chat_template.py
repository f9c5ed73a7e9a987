"""Conversations in a model's own template: roles, where the prompt ends, and what else the template is told."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from server.engines.chat_template import encode_chat
from server.errors import InvalidRequestError
from server.types import ChatRendering
from tests.conftest import byte_tokenizer

HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QWEN = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
EFFORT = "{{ reasoning_effort }}" + CHATML
ONE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}" + CHATML
)


def rendered(template: str, *messages: dict[str, str], **rendering: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.decode(encode_chat(tokenizer, messages, ChatRendering(**rendering))))


def test_a_prompt_ends_where_it_is_told_to() -> None:
    assert rendered(CHATML, HI) == "<user>hi</><assistant>"
    assert rendered(CHATML, HI, add_generation_prompt=False) == "<user>hi</>"
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(CHATML, HI, HELLO, **goes_on) == "<user>hi</><assistant>hello"
    assert rendered(CHATML, HI, {**HELLO, "content": ""}, **goes_on) == "<user>hi</><assistant>"
    assert rendered(CHATML, HI, {**HELLO, "content": "hello "}, **goes_on) == "<user>hi</><assistant>hello "
    trimming = CHATML.replace("m.content", "m.content | trim")
    assert rendered(trimming, HI, {**HELLO, "content": "hello "}, **goes_on) == "<user>hi</><assistant>hello"


def test_a_developer_is_a_system_where_the_template_knows_none() -> None:
    message = {"role": "developer", "content": "be brief"}
    assert rendered(CHATML, message) == "<system>be brief</><assistant>"
    assert rendered("Made by a developer." + CHATML, message).endswith("<system>be brief</><assistant>")
    assert rendered("{% set roles = ['developer'] %}" + CHATML, message) == "<developer>be brief</><assistant>"


def test_several_system_messages_are_served_or_refused_in_the_templates_words() -> None:
    system = {"role": "system", "content": "be brief"}
    assert rendered(CHATML, system, HI, system) == "<system>be brief</><user>hi</><system>be brief</><assistant>"
    with pytest.raises(InvalidRequestError, match=r"refuses them \(System message must be at the beginning\.\)"):
        rendered(ONE_SYSTEM, system, HI, system)


def test_special_tokens_of_the_tokenizer_come_only_when_asked_for() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 257)])
    ids = encode_chat(tokenizer, [HI])
    assert 257 not in ids
    assert encode_chat(tokenizer, [HI], ChatRendering(add_special_tokens=True)) == [257, *ids]


def test_a_template_is_told_the_variables_that_it_reads() -> None:
    assert rendered(QWEN, HI).endswith("<assistant>")
    assert rendered(QWEN, HI, variables={"enable_thinking": True}).endswith("<assistant>")
    assert rendered(QWEN, HI, variables={"enable_thinking": False}).endswith("<assistant><think></think>")


@pytest.mark.parametrize(
    ("template", "name", "value"),
    [
        (CHATML, "enable_thinking", True),
        (CHATML, "date_string", "today"),
        # This model always thinks, so that it cannot be told not to.
        (CHATML + "<think>", "enable_thinking", False),
        # An attribute and a text are no variables.
        (CHATML + "{{ messages[0].thinking }} thinking", "thinking", False),
    ],
)
def test_what_the_template_does_not_read_is_refused(template: str, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="does not read it") as raised:
        rendered(template, HI, variables={name: value})
    assert raised.value.param == f"chat_template_kwargs.{name}"


def test_a_model_that_never_thinks_may_be_told_not_to() -> None:
    plain = rendered(CHATML, HI)
    assert rendered(CHATML, HI, variables={"enable_thinking": False}) == plain
    assert rendered(CHATML, HI, reasoning_effort="none") == plain


def test_reasoning_effort_goes_to_the_setting_that_the_template_has() -> None:
    assert rendered(EFFORT, HI, reasoning_effort="low").startswith("low<user>")
    assert rendered(QWEN, HI, reasoning_effort="low").endswith("<assistant>")
    assert rendered(QWEN, HI, reasoning_effort="none").endswith("<think></think>")
    for template, effort in ((CHATML, "low"), (CHATML + "<think>", "none")):
        with pytest.raises(InvalidRequestError, match="has no setting for it") as raised:
            rendered(template, HI, reasoning_effort=effort)
        assert raised.value.param == "reasoning_effort"


def test_a_variable_of_a_request_wins_over_its_effort() -> None:
    variables = {"enable_thinking": True}
    assert rendered(QWEN, HI, reasoning_effort="none", variables=variables).endswith("<assistant>")
