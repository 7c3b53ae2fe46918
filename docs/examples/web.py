"""A web endpoint that streams replies: `uvicorn web:app`, with MODEL set."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import ov_phi3


class Question(BaseModel):
    """The body of a request."""

    text: str
    max_new_tokens: int = 256


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model when the server starts, and free it when it ends."""
    with ov_phi3.load(os.environ["MODEL"], concurrency=4) as pipe:
        app.state.pipe = pipe
        yield


app = FastAPI(lifespan=lifespan)
WRONG = (ov_phi3.ConfigError, ov_phi3.PromptError, ov_phi3.ContextOverflowError)


async def texts(stream: ov_phi3.TokenStream) -> AsyncIterator[str]:
    """A client that goes away ends the iteration, which cancels the reply."""
    async with stream:
        async for chunk in stream:
            yield chunk.text


@app.post("/ask")
async def ask(question: Question) -> StreamingResponse:
    """Stream the reply to a question as plain text."""
    try:  # what is wrong with the request is raised here, before the reply begins
        stream = app.state.pipe.stream(
            question.text,
            max_new_tokens=question.max_new_tokens,
            timeout=60,
        )
    except WRONG as error:
        raise HTTPException(422, str(error)) from error
    return StreamingResponse(texts(stream), media_type="text/plain")
