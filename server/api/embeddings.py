"""POST /v1/embeddings: not served, and what comes nearest to it."""

from __future__ import annotations

from fastapi import APIRouter

from server.errors import UnsupportedPathError

router = APIRouter()


@router.post("/v1/embeddings", include_in_schema=False)
async def create_embeddings() -> None:
    # Not a 501, which OpenAI's clients would try again.
    raise UnsupportedPathError(
        "Embeddings are not served, since the model was made to continue texts and not to compare them. POST /v1/value "
        'tells what heads say of a text and, with hidden_state: "last", the state behind its last token.'
    )
