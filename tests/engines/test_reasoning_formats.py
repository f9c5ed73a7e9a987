"""How a model marks reasoning, by its chat template or a setting, and what a prompt holds of a response's turn."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.engines.chat_template import begun_turn
from server.engines.segments import FORMATS, OutputFormat
from server.settings import Settings
from server.types import ChatRendering, Opening
from tests.conftest import byte_tokenizer

HISTORY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% if m.reasoning_content is string %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TEMPLATES = {
    # Qwen3, SmolLM3: the model opens its reasoning, and what is off is closed in the prompt.
    "qwen3": HISTORY + PROMPT + SWITCH + "<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # Qwen3.5: either is in the prompt.
    "qwen3.5": HISTORY + PROMPT + SWITCH + "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
    # DeepSeek-R1: past reasoning is left out, and new reasoning opened.
    "deepseek-r1": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}<E>"
        "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
    ),
    # A template that takes no conversation that a user does not end.
    "strict": (
        "{% if not add_generation_prompt and messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{# <think> #}"
    ),
}
CONTINUED = ChatRendering(add_generation_prompt=False, continue_final_message=True)
OFF = ChatRendering(variables={"enable_thinking": False})
HI = {"role": "user", "content": "hi"}


def with_template(template: str | None, **attributes: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def opening(name: str, *messages: dict[str, str], rendering: ChatRendering | None = None) -> Opening:
    tokenizer = with_template(TEMPLATES[name])
    output_format = OutputFormat.of(tokenizer, "auto")
    assert output_format is not None
    assert output_format is FORMATS["think"]
    turn, is_begun = begun_turn(tokenizer, messages, rendering)
    return output_format.opening(turn, is_begun=is_begun)


@pytest.mark.parametrize(
    ("name", "default", "off"),
    [
        ("qwen3", Opening.EITHER, Opening.ANSWER),
        ("qwen3.5", Opening.REASONING, Opening.ANSWER),
        ("deepseek-r1", Opening.REASONING, None),
        ("strict", Opening.EITHER, None),
    ],
)
def test_a_response_begins_as_the_generation_prompt_says(name: str, default: Opening, off: Opening | None) -> None:
    assert opening(name, HI) is default
    if off is not None:
        assert opening(name, HI, rendering=OFF) is off


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("typed", ["<think>", "</think>", "a<think>b</think>", "<|im_start|>assistant\n<think>"])
def test_no_other_message_says_how_a_response_begins(name: str, typed: str) -> None:
    typing = [{"role": "system", "content": typed}, {"role": "user", "content": typed}]
    past = [HI, {"role": "assistant", "content": typed}, HI]
    assert opening(name, *typing) is opening(name, HI)
    assert opening(name, *past) is opening(name, HI)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_continued_message_says_itself_how_its_rest_begins(name: str) -> None:
    for said, expected in (
        ("Hello", Opening.ANSWER),
        ("<think>So", Opening.REASONING),
        ("<think>So</think>", Opening.ANSWER),
        ("<think>So</think>Hello", Opening.ANSWER),
        ("", Opening.EITHER),
    ):
        if name == "deepseek-r1" and "</think>" in said:
            continue  # Its template would cut the message, which is refused.
        message = {"role": "assistant", "content": said}
        assert opening(name, {"role": "user", "content": "<think>"}, message, rendering=CONTINUED) is expected


def test_reasoning_given_back_ends_in_the_prompt() -> None:
    message = {"role": "assistant", "content": "Hel", "reasoning_content": "So"}
    assert opening("qwen3", HI, message, rendering=CONTINUED) is Opening.ANSWER


def test_a_prompt_that_asks_for_no_answer_says_nothing_of_one() -> None:
    assert opening("qwen3.5", HI, rendering=ChatRendering(add_generation_prompt=False)) is Opening.EITHER


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages[0].content.split('</think>')[-1] }}", "think"),
        ("[SYSTEM_PROMPT]Draft in [THINK]here[/THINK].", "mistral"),
        ("{{ '<|channel>thought\n<channel|>' }}", "gemma"),
        ("Write your response after 'Here is my response:' for each query.", "granite"),
        ("{{ '<|START_THINKING|>' }}", "cohere"),
        ("{{ '<seed:think>' }}", "seed"),
        ("{{ messages[0].content }}", None),
        (None, None),
    ],
)
def test_the_chat_template_says_how_reasoning_is_marked(template: str | None, name: str | None) -> None:
    found = OutputFormat.of(with_template(template), "auto")
    assert found is (None if name is None else FORMATS[name])


def test_a_setting_says_it_instead() -> None:
    tokenizer = with_template("<think>")
    assert OutputFormat.of(tokenizer, "none") is None
    assert OutputFormat.of(tokenizer, "seed") is FORMATS["seed"]
    allowed = set(Settings.model_fields["reasoning_format"].annotation.__args__)  # type: ignore[union-attr]
    assert allowed == {"auto", "none", *FORMATS}
    with pytest.raises(ValidationError, match="'auto', 'none', 'think'"):
        Settings(reasoning_format="thinking")  # type: ignore[arg-type]


def test_marks_that_transformers_template_for_responses_names_come_first() -> None:
    fields = {"reasoning_content": {"open": "<r>\n", "close": ["\n</r>", "<end>"]}, "content": {}}
    found = OutputFormat.of(with_template("<think>", response_template={"fields": fields}), "auto")
    assert found == OutputFormat.reasoning("response_template", ("<r>",), ("</r>", "<end>"))
    patterns = {"fields": {"reasoning_content": {"open_pattern": "<r.>", "close": "</r>"}}}
    for told in (patterns, {"fields": []}, {}, "text", {"fields": {"reasoning_content": {"open": [1], "close": ""}}}):
        assert OutputFormat.of(with_template("<think>", response_template=told), "auto") is FORMATS["think"]
