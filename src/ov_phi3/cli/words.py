"""The library's messages in the command line's words: flags instead of arguments."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

__all__ = ["in_flags"]

# What a program would do, and what a person at a command line does instead.
_PHRASES = (
    (r"[Ll]oad(?: the model)? with (?=backend|ov_config|a longer)", "use "),
    (r"a pipeline loaded with (?=backend|ov_config)", ""),
    (r"ov_config=\{'(\w+)': True\} or load\(draft_model=\.\.\.\)", r"--ov-config \1=true or --draft-model"),
    (r"[Ll]oad it with load_chat\(\)", "`ov-phi3 chat --load` takes it"),
    (r"[Ll]oad it with load_prefix\(\)", "--prefix takes it"),
    (r"load\(\) takes the (directory of an exported model): ov_phi3\.export\([^)]*\) or ", r"MODEL is the \1: "),
    (r"Use generate\(\), or ", "Use `ov-phi3 generate`, or "),
)
_VALUE = r"\('([^']*)',\)|'([^']*)'|\"([^\"]*)\"|(True|False)\b"


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library with flags in place of arguments: `top_p=2.0` becomes `--top-p 2.0`.

    A name of one word may also be a word of the sentence, such as "stop", so that it is replaced only where it has a
    value or begins the message.
    """
    for pattern, replacement in _PHRASES:
        message = re.sub(pattern, replacement, message)
    for name, flag in flags.items():
        replaced = functools.partial(_with_value, flag)
        message = re.sub(rf"(?<![\w-]){name}=(?:{_VALUE})?", replaced, message)
        anywhere = "" if "_" in name else "^"
        message = re.sub(rf"{anywhere}(?<![\w.'\"-]){name}(?![\w'\"-])(?!=)", flag, message)
    return message


def _with_value(flag: str, match: re.Match[str]) -> str:
    *texts, switch = match.groups()
    if switch is not None:
        return flag if switch == "True" else flag.replace("--", "--no-", 1)
    text = next((text for text in texts if text is not None), None)
    if text is None:
        return f"{flag} "
    return f"{flag} {text}" if re.fullmatch(r"[\w.-]+", text) else f"{flag} {text!r}"
