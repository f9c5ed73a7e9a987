"""Requests as OpenTelemetry spans, sent to a collector. Needs the extra `otel`; imported only when an endpoint is set.

A span is a child of the caller's, if the request brings a `traceparent`. The SDK's own variables (OTEL_*) choose
sampling and more. Enter at `make_provider` and `Tracing`.
"""

from __future__ import annotations

from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.gate.context import context_of

_NAMES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "key": "recontrol.key_id",
}


def make_provider(endpoint: str) -> TracerProvider:
    """Spans go to `endpoint` (OTLP over HTTP) in batches, from a thread of its own; `shutdown` sends the last."""
    resource = Resource.create({"service.name": "recontrol", "service.version": version("recontrol")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """One span for each request, around everything but the request's identity."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer = provider.get_tracer("recontrol")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        context = context_of(scope)
        with self._tracer.start_as_current_span(scope["method"], context=parent, kind=SpanKind.SERVER) as span:
            span.set_attribute("http.request.method", scope["method"])
            span.set_attribute("recontrol.request_id", context.request_id)

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, send_and_note)
            finally:
                if route := scope.get("route"):
                    # Of the routes' own paths, never the request's, so that there is a bounded number.
                    span.update_name(f"{scope['method']} {route.path}")
                    span.set_attribute("http.route", route.path)
                for name in _NAMES.keys() & context.facts.keys():
                    span.set_attribute(_NAMES[name], context.facts[name])
