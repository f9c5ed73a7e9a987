"""Bad input of many kinds, each with the status and the `param` that must come back.

Enter at `bad_input`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

MAX_BODY_BYTES = 64 * 1024
"""What the soaked server is told to take at most."""
_JSON = {"content-type": "application/json"}
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(slots=True, frozen=True)
class Refused:
    """A request as it is sent, and its answer: the status, and the error's `param` and `code`."""

    name: str
    path: str
    content: bytes
    status: int = 400
    param: str | None = None
    code: str | None = None
    """None takes any."""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(_JSON))
    has_key: bool = True
    may_hang_up: bool = False
    """The connection may break before the answer is read: the server closes it with input unread."""


# What stands for the served model's name and length until they are known.
_MODEL, _MAX_LEN = "$model", "$max-len"


def bad_input(model: str, max_len: int) -> list[Refused]:
    """Every kind, for a server of this model."""
    filled = {f'"{_MAX_LEN}"': str(max_len), _MODEL: json.dumps(model)[1:-1]}
    kinds = []
    for kind in _KINDS:
        content = kind.content
        for sign, text in filled.items():
            content = content.replace(sign.encode(), text.encode())
        kinds.append(replace(kind, content=content))
    return kinds


def _completion(param: str | None, *, status: int = 400, code: str | None = None, **fields: Any) -> Refused:
    """A good completion but for these fields."""
    content = json.dumps({"model": _MODEL, "prompt": "hi", "max_tokens": 4, **fields}).encode()
    return Refused(_name("completion", fields), _COMPLETIONS, content, status, param, code)


def _chat(param: str | None, *, status: int = 400, code: str | None = None, **fields: Any) -> Refused:
    messages = [{"role": "user", "content": "hi"}]
    content = json.dumps({"model": _MODEL, "messages": messages, "max_tokens": 4, **fields}).encode()
    return Refused(_name("chat", fields), _CHAT, content, status, param, code)


def _response(param: str | None, *, code: str | None = None, **fields: Any) -> Refused:
    content = json.dumps({"model": _MODEL, "input": "hi", "max_output_tokens": 4, **fields}).encode()
    return Refused(_name("response", fields), "/v1/responses", content, 400, param, code)


def _control(param: str, *, status: int = 400, code: str | None = None, **fields: Any) -> Refused:
    """Of heads that need not exist: what is wrong with the form is found first."""
    control = {"objective": {"weights": {"positive": 1.0}}, **fields}
    return _completion(param, status=status, code=code, control=control)


def _name(what: str, fields: dict[str, Any]) -> str:
    text = json.dumps(fields)
    return f"{what}: {text if len(text) <= 160 else f'{text[:80]} ... {text[-80:]}'}"


def _protocol(name: str, status: int, content: bytes = b"{}", *, path: str = _COMPLETIONS, **options: Any) -> Refused:
    return Refused(name, path, content, status, **options)


_HUGE = 2**31 - 1
_VALUES: dict[str, list[Any]] = {
    "temperature": [-1, 2.1, "1", True, float("nan"), float("inf")],
    "top_p": [1.1, -1],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "n": [0, -1, 129, 10**6, 1.5],
    "max_tokens": [-1, 1.5, 2**70, "4"],
    "seed": [2**63, 1.5],
    "stop": ["", [""], ["ab"] * 65, ["a"] * 5000, "a" * 257, 3],
    "stop_token_ids": [3, [_HUGE], [1] * 65],
    "logit_bias": [3, {"a": 1}, {"-1": 1}, {str(_HUGE): 1}],
    "presence_penalty": [2.1, "1"],
    "frequency_penalty": [-2.1, []],
    "repetition_penalty": [0, 10.5],
    "logprobs": [-1, 21, True],
    "echo": ["yes"],
    "stream": ["true", 1],
    "stream_options": [{"include_usage": True}],
    "user": ["u" * 257, 3],
    "timeout_s": [0, -1, 86_401],
    "prompt": ["", [], [[]], [""], ["a", ""], [-1], [_HUGE], [1.5], [True], [[1], "a"], {}, None, ["a"] * 65, "\ud800"],
    "best_of": [2],
    "suffix": ["x"],
    "no_such_field": [1],
}
_CONTROLS: list[Refused] = [
    _completion("control", control=3),
    _completion("control.objective", control={}),
    _control("control.objective.weights", objective={"weights": {}}),
    _control("control.objective.type", objective={"type": "sum", "weights": {"positive": 1.0}}),
    _control("control.objective.floors", objective={"type": "floor", "weights": {"positive": 1.0}}),
    _control("control.step_size", step_size=11),
    _control("control.step_size", step_size=-1),
    _control("control.steps", steps=1.5),
    _control("control.steps", steps=101),
    _control("control.max_kl", max_kl=0),
    _control("control.max_kl", max_kl=0.51),
    _control("control.max_shift", max_shift=2.1),
    _control("control.max_response_kl", max_response_kl=0),
    _control("control.gate", gate={"head": "positive"}),
    _control("control.window", window={"start": 3, "end": 3}),
    _control("control.schedule.type", schedule={"type": "sine"}),
    _control("control.schedule.tokens", schedule={"type": "linear", "tokens": 0}),
    _control("control.no_such_field", no_such_field=1),
    _control(
        "control.objective.weights", status=404, code="head_not_found", objective={"weights": {"no-such-head": 1.0}}
    ),
    _control(
        "control.objective.weights", status=404, code="head_not_found", objective={"weights": {"../../etc/passwd": 1.0}}
    ),
]
_CHATS: list[Refused] = [
    _chat("messages", messages=[]),
    _chat("messages.0.tool_call_id", messages=[{"role": "tool", "content": "x"}]),
    _chat("messages.0.content", messages=[{"role": "user", "content": None}]),
    _chat("messages.0.content", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
    _chat("messages.0.name", messages=[{"role": "user", "content": "x", "name": 3}]),
    _chat("chat_template", chat_template="{{ 1 }}"),
    _chat("top_logprobs", top_logprobs=3),
    _chat("max_tokens", max_tokens=0),
    _chat("max_tokens", max_tokens=3, max_completion_tokens=4),
    _chat("model", status=404, code="model_not_found", model="no-such-model"),
]
_PROTOCOL: list[Refused] = [
    _protocol("no JSON", 400, b'{"model": ', code="invalid_json"),
    _protocol("JSON, nested deeply", 400, b"[" * 10_000 + b"]" * 10_000),
    _protocol("a list for a body", 400, b"[1, 2]"),
    _protocol("an empty object", 400, code="missing_field", param="model"),
    _protocol("not called JSON", 415, b"model=a", headers={"content-type": "application/x-www-form-urlencoded"}),
    _protocol("a body too large", 413, b" " * (MAX_BODY_BYTES + 1), may_hang_up=True),
    _protocol("headers too large", 431, headers={**_JSON, "x-large": "a" * 40_000}, may_hang_up=True),
    _protocol("no such path", 404, path="/v1/no-such-path"),
    _protocol("another method", 405, b"", method="GET", headers={}),
    _protocol("no key", 401, has_key=False),
    _protocol("a wrong key", 401, has_key=False, headers={**_JSON, "authorization": "Bearer wrong"}),
    _protocol("token ids that no text has", 400, b'{"tokens": [-1]}', path="/detokenize", param="tokens.0"),
]
_RESPONSES: list[Refused] = [
    _response("input", input=3),
    _response("input", input=[{"role": "user", "content": "x"}] * 1025),
    _response("input.0.type", input=[{"type": "item_reference", "id": "msg_1"}]),
    _response("input.0.content", input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
    _response("input.0.call_id", input=[{"type": "function_call_output", "call_id": "a", "output": "x"}]),
    _response("text.format.type", text={"format": {"type": "grammar"}}),
    _response("tools.0", tools=[{"type": "web_search"}]),
    _response("previous_response_id", previous_response_id="resp_1"),
    _response("max_output_tokens", code="context_length_exceeded", max_output_tokens=_MAX_LEN),
    _protocol("embeddings", 404, path="/v1/embeddings", code="unsupported_path"),
    _protocol("a stored response", 404, b"", path="/v1/responses/resp_1", method="GET", headers={}, code="not_found"),
]
_KINDS: list[Refused] = [
    *(_completion(name, **{name: value}) for name, values in _VALUES.items() for value in values),
    _completion("max_tokens", max_tokens=0),
    _completion("stop_token_ids.0", stop_token_ids=[-1]),
    _completion("stop_token_ids.1", stop_token_ids=[1, "1"]),
    _completion("n", n=128, prompt=["a"] * 3),
    _completion("model", status=404, code="model_not_found", model="no-such-model"),
    _completion("model", model=""),
    *_CONTROLS,
    *_CHATS,
    *_RESPONSES,
    *_PROTOCOL,
    _completion("max_tokens", code="context_length_exceeded", max_tokens=_MAX_LEN),
    _completion("model", status=404, code="head_not_found", model=f"{_MODEL}@no-such-head"),
]
