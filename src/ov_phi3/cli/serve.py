"""`ov-phi3 batch` and `ov-phi3 serve`: many prompts from a file, and OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ov_phi3.cli import terminal
from ov_phi3.cli.options import add_generation_options, generation_config

__all__ = ["add_batch", "add_serve"]

_KEY = "OV_PHI3_API_KEY"
_BATCH_REPLIES, _SERVED_REPLIES = 16, 8  # at once


def add_batch(commands: Any) -> None:
    """Add the `batch` command."""
    parser = commands.add_parser(
        "batch",
        help="replies to a file of prompts",
        description="Replies to a file of prompts, one JSON value a line. Started again after a kill, it goes on with "
        "the prompts that have no reply.",
    )
    terminal.add_load_arguments(parser)
    parser.add_argument("prompts", type=Path, help="JSON lines: texts, objects, or OpenAI's batch format")
    parser.add_argument("replies", type=Path, help="output, in the order of the prompts")
    terminal.add_concurrency(parser, _BATCH_REPLIES)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compute in the device's own precision; replies then depend a little on what runs beside them",
    )
    parser.add_argument("--model-name", default="phi-3", help="name in OpenAI's responses (default: %(default)s)")
    add_generation_options(parser)
    parser.set_defaults(run=_batch)


def add_serve(commands: Any) -> None:
    """Add the `serve` command."""
    parser = commands.add_parser(
        "serve", help="OpenAI's API over HTTP", description="Serve a model with OpenAI's API over HTTP."
    )
    terminal.add_load_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    add("--model-name", default="phi-3", help="name that requests call the model by (default: %(default)s)")
    add("--api-key", metavar="KEY", help=f"key that requests must send; default: ${_KEY}, which no process list shows")
    terminal.add_concurrency(parser, _SERVED_REPLIES)
    add("--max-queue", type=int, default=32, metavar="N", help="replies that may wait (default: %(default)s)")
    add("--max-tokens", type=int, metavar="N", help="longest reply, in tokens (default: the context window)")
    add("--max-body-mb", type=float, default=4.0, metavar="MB", help="largest request, in MiB (default: %(default)s)")
    add("--max-sessions", type=int, default=16, metavar="N", help="sessions kept in memory (default: %(default)s)")
    add(
        "--session-gb", type=float, default=2.0, metavar="GB", help="their size together, in GiB (default: %(default)s)"
    )
    add("--reply-timeout", type=float, metavar="S", help="longest time of a reply, in seconds (default: any)")
    add("--cors-origin", action="append", default=[], metavar="URL", help="origin whose pages may call; repeatable")
    add(
        "--drain",
        type=int,
        default=30,
        metavar="S",
        help="seconds that running replies have to end after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    parser.set_defaults(run=_serve)


def _batch(args: argparse.Namespace) -> int:
    from ov_phi3.serving.batch_file import run_batch
    from ov_phi3.serving.properties import EXACT

    config = generation_config(args)
    with args.prompts.open("rb"):  # before the model is loaded
        pass
    if not args.fast:
        given = {pair.partition("=")[0] for pair in args.ov_config}
        args.ov_config += [f"{key}={value}" for key, value in EXACT.items() if key not in given]
    with terminal.load(args, "infer_request", _BATCH_REPLIES) as pipe, terminal.status_line() as show:
        summary = run_batch(
            pipe,
            args.prompts,
            args.replies,
            config,
            model_name=args.model_name,
            on_progress=lambda done, total: show(f"{done} of {total} replies"),
        )
    terminal.note(
        f"{summary.total} replies in {args.replies}: {summary.kept} kept, {summary.total - summary.kept} new with "
        f"{summary.generated_tokens} tokens, {summary.errors} errors"
    )
    return 0


def _serve(args: argparse.Namespace) -> int:
    from ov_phi3.serving import create_app
    from ov_phi3.serving.extras import check_installed

    check_installed()
    import uvicorn

    key = args.api_key or os.environ.get(_KEY) or None
    if key is None and not _is_loopback(args.host):
        terminal.note(f"warning: anyone who reaches {args.host} can use this server; set ${_KEY}.")
    with terminal.load(args, "infer_request", _SERVED_REPLIES) as pipe:
        app = create_app(
            pipe,
            args.model_name,
            key,
            args.max_queue,
            max_tokens=args.max_tokens,
            max_body_bytes=int(args.max_body_mb * 2**20),
            max_sessions=args.max_sessions,
            max_session_bytes=int(args.session_gb * 2**30),
            timeout=args.reply_timeout,
            cors_origins=args.cors_origin,
        )
        pipe.warmup()
        # The server handles both signals while it runs, and raises them again when it has ended.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvicorn.run(
            app,
            host=args.host,
            port=args.port,
            timeout_graceful_shutdown=args.drain,
            access_log=False,
            server_header=False,
        )
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
