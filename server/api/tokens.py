"""/tokenize, /detokenize and /tokenizer_info, as in vLLM: what a prompt or a chat is to the model, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from server.api.body import JsonRoute
from server.api.fields import MAX_PROMPT_TOKENS, TokenId
from server.api.generation import tokenized
from server.api.json_text import json_bytes
from server.api.messages import ChatMessage, Messages, TemplateFields
from server.api.resolution import model_ids
from server.api.tools import Tools, offered
from server.api.unserved import WithUnserved
from server.engines.base import Engine, check_token_ids
from server.errors import UnknownModelError
from server.field_errors import field_error
from server.unicode import check_text

router = APIRouter(route_class=JsonRoute)


class _TokenBody(WithUnserved):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Any id of /v1/models: all have the same tokens."""


class TokenizeBody(_TokenBody, TemplateFields):
    """A plain prompt, or messages in the model's own chat template, rendered as a chat's are.

    `add_special_tokens` is true by default of a prompt and false of messages.
    """

    prompt: Annotated[str, AfterValidator(check_text)] | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """Those that the model is told of, as in a chat."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "give either prompt or messages")
        if self.messages is not None:
            self.check_rendering(self.messages)
            return self
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                raise field_error(name, "only allowed with messages")
        return self


class DetokenizeBody(_TokenBody):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    engine = _engine(request, body)
    return await _answer(request, lambda: _tokenized(engine, body))


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    engine = _engine(request, body)
    check_token_ids(body.tokens, engine.info.vocab_size, param="tokens")
    return await _answer(request, lambda: {"prompt": engine.decode(body.tokens)})


def _tokenized(engine: Engine, body: TokenizeBody) -> dict[str, Any]:
    if body.messages is not None:
        rendering = body.rendering(tools=offered(body.tools or ()))
        tokens = engine.encode_chat(ChatMessage.plain(body.messages), rendering)
    else:
        tokens = engine.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    return {
        "count": len(tokens),
        "max_model_len": engine.info.max_model_len,
        "tokens": tokens,
        "token_strs": engine.texts_alone(tokens) if body.return_token_strs else None,
    }


async def _answer(request: Request, content: Callable[[], dict[str, Any]]) -> Response:
    """Read and written off the event loop, since both take as long as the text is."""
    text = await tokenized(request, lambda: json_bytes(content()))
    return Response(text, media_type="application/json")


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs that cuts texts by this server's tokens: special tokens, the template, the context."""
    engine: Engine = request.app.state.engine
    return {**engine.tokenizer_info(), "model_max_length": engine.info.max_model_len}


def _engine(request: Request, body: _TokenBody) -> Engine:
    engine: Engine = request.app.state.engine
    if body.model is not None and body.model not in model_ids(engine.info):
        raise UnknownModelError(body.model, model_ids(engine.info))
    return engine
