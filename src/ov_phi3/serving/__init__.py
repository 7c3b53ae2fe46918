"""Replies for other programs: OpenAI's API over HTTP, and files of prompts.

`create_app` needs the packages of the extra `serve`; files of prompts need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.serving.app import create_app

__all__ = ["create_app"]


if not TYPE_CHECKING:  # with it, type checkers would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name != "create_app":
            raise AttributeError(f"module 'ov_phi3.serving' has no attribute {name!r}")
        from ov_phi3.serving.extras import check_installed

        check_installed()
        from ov_phi3.serving.app import create_app

        return create_app
