"""Answers in JSON."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

__all__ = ["JsonResponse"]


class JsonResponse(Response):
    """JSON in ASCII: what a client sends as half a character cannot break an answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False).encode()
