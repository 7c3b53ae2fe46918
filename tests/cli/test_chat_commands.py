"""The commands of `ov-phi3 chat`, with messages from a pipe."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ov_phi3.cli import main
from ov_phi3.cli.commands import COMMANDS, Completions, option_name, option_value
from ov_phi3.cli.markdown import Rendered
from ov_phi3.cli.replies import Wrapped
from ov_phi3.errors import ConfigError

CAPITAL = "What is the capital of France?"
Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(demo_int4: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Runs a chat with these lines and flags; returns what it printed to stdout and to stderr."""

    def run(*lines: str, flags: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(demo_int4), "--device", device, *flags]) == code
        out, err = capsys.readouterr()
        return out, err

    return run


def test_piped_messages_are_answered_without_prompt_signs(demo_int4: Path, device: str) -> None:
    command = [sys.executable, "-m", "ov_phi3", "chat", str(demo_int4), "--device", device]
    text = f'\ufeff{CAPITAL}\r\n\r\n"""{CAPITAL}\r\nOne word."""\r\n/exit\r\nnever\r\n'
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("The capital of France is Paris")
    assert ">" not in done.stdout.decode()
    assert b"/help" not in done.stderr
    bad = subprocess.run(
        command, input=b"caf\xe9\n", capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert bad.returncode == 2
    assert b"standard input is not valid UTF-8" in bad.stderr


def test_a_reply_is_generated_again(talk: Talk) -> None:
    out, err = talk("/retry", CAPITAL, "/retry", "/set temperature 1.5", "/retry", "/show")
    assert "there is no reply yet" in err
    replies = [line for line in out.splitlines() if line]
    assert replies[0][:30] == replies[1][:30] == "The capital of France is Paris"
    assert err.count("The reply is greedy, so it will be the same") == 1
    assert err.count(f"user: {CAPITAL}") == 1  # each reply took the place of the one before


def test_a_turn_that_failed_can_be_tried_again(talk: Talk) -> None:
    _, err = talk(CAPITAL, "word " * 300, "/show", "/retry", flags=("--context-length", "200", "--overflow", "error"))
    assert err.count("ContextOverflowError") == 2
    assert err.count("assistant: ") == 1


def test_the_system_message_is_changed_for_the_whole_conversation(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Be brief.\r\n")
    _, err = talk(
        "/system", CAPITAL, "/system Be long.", "/show", "/system none", "/system", "/clear", "/kv",
        flags=("--system-file", str(tmp_path / "s.txt")),
    )  # fmt: skip
    assert "System message: Be brief.\n" in err
    assert f"system: Be long.\nuser: {CAPITAL}\nassistant: " in err
    assert "There is no system message." in err
    assert "0 of 0 tokens cached" in err


def test_a_conversation_is_saved_and_loaded(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "a talk.kv"
    _, err = talk(
        CAPITAL, f"/save {file}", "/save", f"/save {tmp_path}/no/x", "/clear", f"/load {file}", "/show", "/load"
    )
    assert f"Saved to {file}" in err
    assert "name the file: /save FILE" in err
    assert "name the file: /load FILE" in err
    assert "SnapshotError" in err
    assert "2 messages, " in err
    assert f"user: {CAPITAL}" in err
    assert "does not exist" in talk(f"/load {tmp_path}/nothing")[1]


def test_a_text_that_begins_with_a_slash_is_sent_with_two(talk: Talk) -> None:
    _, err = talk("//help", "/show", "/nonsense", "/usr/bin is what?", flags=("--max-new-tokens", "2"))
    assert "user: /help" in err
    assert "/nonsense is not a command" in err
    assert "/usr/bin is not a command; /help lists them. A message that begins with / is typed as //." in err


def test_every_command_is_explained_and_there(talk: Talk) -> None:
    _, err = talk("/help", "/?", "/quit", "/kv")
    for name in COMMANDS:
        assert f"\n{name} " in err
    assert "cached" not in err


def test_options_are_set_shown_and_taken_back(talk: Talk) -> None:
    _, err = talk(
        "/set", "/set max-tokens 5", "/set max_new_tokens", "/set max_new_tokens off", "/set stop_on_loop off",
        "/set max_new_tokens default", "/set stop_on_loop default", "/set top_k",
    )  # fmt: skip
    options = [line for line in err.splitlines() if line.startswith("Options:")]
    assert options == [
        "Options: stop_on_loop (64, 16), max_new_tokens 1024 (/set max_new_tokens N).",
        "Options: stop_on_loop (64, 16), max_new_tokens 5.",
        "Options: stop_on_loop (64, 16).",
        "Options: the defaults.",
        "Options: max_new_tokens 1024 (/set max_new_tokens N).",
        "Options: stop_on_loop (64, 16), max_new_tokens 1024 (/set max_new_tokens N).",
    ]
    assert "max_new_tokens 5\n" in err
    assert "top_k is not set." in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "'temprature' is not an option; did you mean temperature?"),
        ("/set zzz 1", "'zzz' is not an option; there are max_new_tokens, "),
        ("/set temperature -1", "temperature=-1.0 is out of range"),
        ("/set temperature hot", "temperature: invalid float value: 'hot'"),
        ("/set num_beams 4", "num_beams=4 does not work in a chat"),
        ("/set max_new_tokens 100000", "max_new_tokens=100000 does not fit the context window"),
        ("/set ignore_eos maybe", "ignore_eos 'maybe'; expected on or off"),
        ("/set logit_bias 5=x", "logit_bias '5=x'; expected ID=BIAS"),
        ("/set stop_on_loop 4", "stop_on_loop: expected 2 arguments"),
        ("/set top_k 4 5", "top_k: invalid int value: '4 5'"),
        ("/set stop 'a", "No closing quotation"),
        ("/set json_schema @nothing.json", "nothing.json cannot be read"),
        ("/set stop_token_ids 99999999", "stop_token_ids holds 99999999"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_set(talk: Talk, line: str, message: str) -> None:
    _, err = talk(line, "/set", flags=("--max-new-tokens", "3", "--stop-on-loop", "9", "9"))
    assert message in err
    assert err.splitlines()[-1] == "Options: max_new_tokens 3, stop_on_loop (9, 9)."


def test_an_option_that_the_backend_lacks_is_refused_when_it_is_set(talk: Talk) -> None:
    _, err = talk("/set top_logprobs 1", "/set", flags=("--backend", "llm_pipeline"))
    assert "top_logprobs=1 needs --backend infer_request" in err
    assert "Options: max_new_tokens 1024 (/set max_new_tokens N)." in err


def test_log_probabilities_are_printed_in_a_chat(talk: Talk) -> None:
    out, _ = talk(CAPITAL, flags=("--top-logprobs", "1", "--max-new-tokens", "3"))
    assert out.splitlines()[2].split()[0] == "token"
    assert len(out.splitlines()) == 6


def test_a_reply_without_a_limit_ends_in_its_loop(talk: Talk) -> None:
    _, err = talk("Tell me a long story of a cat", flags=("--ignore-eos", "--repetition-penalty", "0.2"))
    assert "ended in a loop" in err


def test_a_reply_without_a_limit_has_the_one_of_the_chat(talk: Talk) -> None:
    flags = ("--ignore-eos", "--context-length", "400", "--backend", "llm_pipeline")
    _, err = talk(CAPITAL, flags=flags)
    assert ", 100 new" in err  # a quarter of the window
    assert "ended at its length limit" in err


def test_the_limit_of_the_chat_gives_way_at_the_end_of_the_window(talk: Talk) -> None:
    flags = ("--ignore-eos", "--context-length", "150", "--overflow", "error", "--backend", "llm_pipeline")
    _, err = talk(*[CAPITAL] * 3, flags=flags)
    assert ", 37 new" in err
    assert "ContextOverflowError" not in err.partition(CAPITAL)[0].split("first token")[1]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("presence_penalty", "-1", -1.0),
        ("ignore_eos", "on", True),
        ("do_sample", "No", False),
        ("stop", r'"a b" c\nd', ["a b", "cnd"]),
        ("stop", r'"x\n"', ["x\n"]),
        ("stop_token_ids", "1 2", [1, 2]),
        ("stop_on_loop", "8 4", [8, 4]),
        ("logit_bias", "5=1.5 6=-inf", {5: 1.5, 6: float("-inf")}),
        ("regex", "a b|c", "a b|c"),
        ("speculation", "auto", "auto"),
    ],
)
def test_values_of_set(name: str, text: str, value: object) -> None:
    assert option_value(name, text) == value


def test_names_of_set() -> None:
    assert option_name("--max-tokens") == option_name("max_new_tokens") == "max_new_tokens"
    with pytest.raises(ConfigError, match="did you mean"):
        option_name("top_kk")


def test_completions() -> None:
    completions = Completions()
    assert ("/retry", COMMANDS["/retry"].meaning) in completions.after("/re")
    assert "temperature" in dict(completions.after("/set temp"))
    assert [value for value, _ in completions.after("/set speculation ")] == ["off", "auto", "default"]
    assert [value for value, _ in completions.after("/set ignore_eos ")] == ["on", "off", "default"]
    assert completions.after("/kv ") == completions.after("/set a b c") == []


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four", ["one two", "three four"]),
        ("one two\nthree", ["one two", "three"]),
        ("  indented text", ["  indented", "text"]),
        ("a\n\nb", ["a", "", "b"]),
        ("unbreakablelongword x", ["unbreakablelongword", "x"]),
        ("漢字漢字 漢字", ["漢字漢字", "漢字"]),
        ("a\x1b[2Jb\r", ["a[2Jb"]),
    ],
)
def test_text_is_wrapped_between_words(
    text: str, lines: list[str], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = Wrapped(10)
    for start in range(0, len(text), step):
        wrapped.feed(text[start : start + step])
    wrapped.end()
    out = capsys.readouterr().out
    assert out == "".join(f"{line}\n" for line in lines)


MARKDOWN = """# Title

A `List<int>` and a List<int> with **bold**.
Second line.

1. one
2. two

```python
def f():
    return 1
```

| a | b |
| - | - |
| 1 | 2 |

The end."""


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_markdown_is_printed_once_and_whole(step: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    rendered = Rendered(Console(file=out, width=40, highlight=False))
    for start in range(0, len(MARKDOWN), step):
        rendered.feed(MARKDOWN[start : start + step])
    rendered.end()
    lines = out.getvalue().splitlines()
    assert lines == [
        "Title",
        "",
        "A List<int> and a List<int> with bold.",
        "Second line.",
        "",
        " 1 one",
        " 2 two",
        "",
        "def f():",
        "    return 1",
        "",
        " a  b",
        lines[12],
        " 1  2",
        "",
        "The end.",
    ]


@pytest.mark.parametrize(
    "text", ["[a]: http://x.y", "<b>bold</b>", "<!-- note -->", "a <br> b", "&lt; \\* 5 * 3 * 2", "1) one"]
)
def test_no_text_is_lost_in_markdown(text: str) -> None:
    from rich.console import Console

    out = io.StringIO()
    rendered = Rendered(Console(file=out, width=60, highlight=False))
    rendered.feed(text)
    rendered.end()
    letters = [character for character in text.replace("&lt;", "<") if character.isalnum() or character in "<>"]
    assert [character for character in out.getvalue() if character.isalnum() or character in "<>"] == letters
