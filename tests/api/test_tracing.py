"""Spans of requests, read from the SDK and as a collector gets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from server.app import create_app
from server.engines.fake import FakeEngine
from server.errors import ConfigurationError
from server.settings import Settings
from tests.api.conftest import complete

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Keeps the bodies that are sent to it."""

    def __init__(self) -> None:
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.bodies = bodies
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def spans(self) -> list[dict[str, object]]:
        return [
            {
                "name": span.name,
                "trace": span.trace_id.hex(),
                "parent": span.parent_span_id.hex(),
                "is_error": span.status.code == 2,
                **{a.key: a.value.string_value or a.value.int_value for a in span.attributes},
            }
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def test_a_request_is_a_span_below_the_callers_that_says_what_it_was_and_took(
    make_app: Callable[..., FastAPI], collector: Collector
) -> None:
    app = make_app(settings={"otlp_endpoint": collector.endpoint}, fail_after=2)
    with TestClient(app) as client:
        complete(client, max_tokens=2)
        client.post("/v1/completions", json={}, headers={"traceparent": PARENT, "x-request-id": "r-1"})
        complete(client, max_tokens=5)
        client.get("/v1/heads/plain")
        client.get("/secret-path")
    first, refused, failed, head, unknown = collector.spans()
    assert first["name"] == "POST /v1/completions"
    assert (first["gen_ai.request.model"], first["gen_ai.usage.input_tokens"]) == ("fake", 5)
    assert (first["gen_ai.usage.output_tokens"], first["http.response.status_code"]) == (2, 200)
    assert (refused["trace"], refused["parent"]) == (PARENT.split("-")[1], PARENT.split("-")[2])
    assert (refused["recontrol.request_id"], refused["http.response.status_code"]) == ("r-1", 400)
    assert (failed["is_error"], first["is_error"], refused["is_error"]) == (True, False, False)
    assert head["http.route"] == "/v1/heads/{name}"
    assert unknown["name"] == "GET"
    assert not any("secret" in str(value) for value in unknown.values())


def test_without_its_packages_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ConfigurationError, match=r"recontrol\[otel\]"):
        create_app(Settings(otlp_endpoint="http://127.0.0.1:1/v1/traces"), FakeEngine())
