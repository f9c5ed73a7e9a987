"""Where an instruction is placed before a prompt, on templates of several kinds; it is content wherever it is."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from server.engines.chat_template import encode_chat
from server.engines.checkpoint.packaged import default_model_folder
from server.engines.instruction import encode_instructed
from server.errors import InvalidRequestError
from server.types import ChatRendering
from tests.conftest import byte_tokenizer
from tests.engines.test_content import tokenizer_of

TEXT = "Be glad."
HI = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DEAF = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DEFAULT = "{% if messages[0].role != 'system' %}system: I help.\n{% endif %}" + PLAIN


def instructed(template: str, messages: list[dict[str, Any]], text: str = TEXT, **rendering: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    how = ChatRendering(**rendering)
    bare = encode_chat(tokenizer, messages, how)
    return str(tokenizer.decode(encode_instructed(tokenizer, text, bare, messages, how)))


@pytest.mark.parametrize(
    ("template", "first"),
    [(PLAIN, f"system: {TEXT}\nuser: hi\n"), (DEFAULT, f"system: I help.\n\n{TEXT}\nuser: hi\n"),
     (NO_SYSTEM, f"user: {TEXT}\n\nhi\n"), (DEAF, f"user: {TEXT}\n\nhi\n")],
    ids=["plain", "default", "refuses", "leaves out"],
)  # fmt: skip
def test_it_is_the_system_message_or_begins_the_first_users(template: str, first: str) -> None:
    assert instructed(template, [HI]) == first
    conversation = [HI, {"role": "assistant", "content": "ho"}, HI]
    assert instructed(template, conversation) == f"{first}assistant: ho\nuser: hi\n"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_it_comes_behind_what_the_callers_own_system_message_says(role: str) -> None:
    assert instructed(PLAIN, [{"role": role, "content": "Be brief."}, HI]) == (
        f"system: Be brief.\n\n{TEXT}\nuser: hi\n"
    )
    assert instructed(PLAIN, [{"role": role, "content": ""}, HI]) == f"system: {TEXT}\nuser: hi\n"


def test_an_answer_that_is_begun_goes_on_behind_it() -> None:
    begun = [HI, {"role": "assistant", "content": "Well"}]
    shown = instructed(PLAIN, begun, add_generation_prompt=False, continue_final_message=True)
    assert shown == f"system: {TEXT}\nuser: hi\nassistant: Well"


def test_a_conversation_without_a_place_for_it_is_refused_by_name() -> None:
    for template, why in ((DEAF, "leaves instructions out"), (NO_SYSTEM, "no system")):
        with pytest.raises(InvalidRequestError, match=rf"^control\.objective\.text: .*{why}") as caught:
            instructed(template, [{"role": "assistant", "content": "ho"}])
        assert caught.value.param == "control.objective.text"


@pytest.mark.parametrize("template", ["chatml", "llama 3", "gemma", "qwen 3"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_what_it_spells_never_becomes_a_control_token(template: str, is_chat: bool) -> None:
    tokenizer = tokenizer_of(template)
    messages = [HI] if is_chat else None
    bare = encode_chat(tokenizer, [HI]) if is_chat else [104, 105]
    plain = encode_instructed(tokenizer, "be glad", bare, messages)
    spelt = encode_instructed(tokenizer, "be<|im_end|><|eot_id|><end_of_turn><|im_start|>glad", bare, messages)
    assert [i for i in spelt if i > 255] == [i for i in plain if i > 255]
    assert "<|eot_id|><end_of_turn>" in tokenizer.decode(spelt)


def test_a_plain_prompts_own_tokens_stay_behind_what_the_tokenizer_adds() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 257)])
    prompt = tokenizer("hi")["input_ids"]
    own = tokenizer(f"{TEXT}\n\n", add_special_tokens=False)["input_ids"]
    assert encode_instructed(tokenizer, TEXT, prompt) == [257, *own, *prompt[1:]]
    assert encode_instructed(tokenizer, TEXT, prompt[1:]) == [*own, *prompt[1:]]


def test_in_the_default_models_template_it_comes_behind_the_default_system_message() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(default_model_folder())
    bare = encode_chat(tokenizer, [HI])
    shown = tokenizer.decode(encode_instructed(tokenizer, TEXT, bare, [HI]))
    assert shown.replace(f"\n\n{TEXT}", "") == tokenizer.decode(bare)
    assert "named SmolLM" in shown
