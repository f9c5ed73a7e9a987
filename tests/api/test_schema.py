"""Schemathesis sends what the served OpenAPI document allows, and what it does not, to every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.telemetry import Telemetry

MANAGER = "Manager-0123456789"
ROUTES = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/value", "/tokenize", "/detokenize"}
# Rules between fields, and what depends on the model, cannot be said in a schema.
UNSAID = [positive_data_acceptance]

telemetry = Telemetry()
app = create_app(Settings(management_keys=MANAGER), FakeEngine(observer=telemetry), telemetry)  # type: ignore[arg-type]
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
statuses: dict[str, set[int]] = {}


@pytest.fixture(scope="module", autouse=True)
def _started() -> Iterator[None]:
    with TestClient(app):
        yield


def within_reach(body: dict[str, Any]) -> dict[str, Any]:
    """The body with names and sizes that this server has; else nearly every one would end at them."""
    known = {"model": "fake", "timeout_s": None, "max_tokens": 3, "max_completion_tokens": None, "control": None,
             "max_output_tokens": 3, "text": None, "response_format": None, "structured_outputs": None,
             "guided_json": None, "guided_choice": None, "stop_token_ids": [7], "logit_bias": {"7": 1},
             "top_logprobs": None, "stream_options": None, "tools": None, "tool_choice": None,
             "tokens": [104, 105], "heads": ["plain"]}  # fmt: skip
    if body.get("input") is not None:
        known["messages"] = None
    if body.get("prompt") is not None:
        known |= dict.fromkeys(
            ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"), None
        )
    messages = known.get("messages", body.get("messages"))
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        # What a role may say is not in the document, and most conversations that hold to it begin with an answer.
        known["messages"] = [{"role": "user", "content": message.get("content") or "hi"} for message in messages]
    return {**body, **{name: value for name, value in known.items() if name in body}}


# With a parameter of their own pytest tells the operations apart; without one they have one id, and are run once.
@pytest.mark.parametrize("key", [MANAGER], ids=["manager"])
@schema.parametrize()
@settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
def test_every_answer_is_one_that_the_document_promises(case: Case, key: str) -> None:
    is_allowed = case.meta is None or case.meta.generation.mode.is_positive
    if is_allowed and isinstance(case.body, dict):
        case.body = within_reach(case.body)
    response = case.call(headers={"Authorization": f"Bearer {key}"})
    statuses.setdefault(case.operation.path, set()).add(response.status_code)
    case.validate_response(response, excluded_checks=UNSAID)


def test_the_document_says_what_each_field_of_control_means() -> None:
    schemas = app.openapi()["components"]["schemas"]
    for name, field in schemas["ControlParams"]["properties"].items():
        forms = [field, *field.get("oneOf", ()), *field.get("anyOf", ())]
        models = [schemas[form["$ref"].rsplit("/")[-1]] for form in forms if "$ref" in form]
        nested = [form for any_of in field.get("anyOf", ()) for form in any_of.get("oneOf", ())]
        models += [schemas[form["$ref"].rsplit("/")[-1]] for form in nested]
        assert "description" in field or (models and all("description" in model for model in models)), name


def test_the_bodies_got_past_the_schema() -> None:
    if len(statuses) < 10:
        pytest.skip("needs the test above to have run whole")
    assert {path for path, seen in statuses.items() if {200, 400} <= seen} >= ROUTES
