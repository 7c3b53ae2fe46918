"""`ov-phi3 chat` and `generate` in a pseudo-terminal, with and without the packages of the extra "cli"."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

from terminals import WITHOUT_EXTRA, Terminal

CAPITAL = "What is the capital of France?"


@pytest.fixture(params=["", WITHOUT_EXTRA], ids=["editor", "plain"])
def code(request: pytest.FixtureRequest) -> str:
    """Both ways to read messages: with `prompt_toolkit` and `rich`, and with `input`."""
    return request.param


@pytest.fixture
def state(tmp_path: Path) -> str:
    """An empty folder for the history."""
    return str(tmp_path / "state")


@pytest.fixture
def chat(demo_int4: Path, device: str, code: str, state: str) -> Iterator[Terminal]:
    argv = ["chat", str(demo_int4), "--device", device, "--ignore-eos", "--stop-on-loop", "8", "400"]
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as terminal:
        yield terminal


def test_a_long_chat_drops_turns_and_obeys_its_commands(demo_int4: Path, device: str, code: str, state: str) -> None:
    options = ["--device", device, "--context-length", "300", "--max-new-tokens", "20", "--prefill-chunk", "64"]
    with Terminal(["chat", str(demo_int4), *options], code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type(f"{CAPITAL}\r")
        chat.until("Paris")
        chat.until(">")
        chat.type("/kv\r")
        chat.until("tokens cached (")
        chat.until("of 300 free")
        chat.until(">")
        chat.type("/rewind 5\r")
        chat.until("expected 0 to 1")
        chat.until(">")
        chat.type("/rewind x\r")
        chat.until("/rewind x: expected a number of turns.")
        chat.until(">")
        chat.type("Repeat: " + "bread " * 255 + "\r")
        chat.until("oldest turn was dropped")
        chat.until(">")
        chat.type("/rewind\r")
        chat.until("Back to the beginning.")
        chat.until(">")
        chat.type("And of Italy?\r")
        chat.until("first token")
        chat.until(">")
        chat.type("/rewind 0\r")
        chat.until("Back to after: And of Italy?")
        chat.until(">")
        chat.type("word " * 400 + "\r")
        chat.until("ContextOverflowError:")
        chat.until(">")
        chat.type("/exit\r")
        assert chat.exit_code() == 0


def test_ctrl_c_stops_the_reply_but_not_the_chat(chat: Terminal) -> None:
    chat.until(">")
    chat.type(f"{CAPITAL}\r")
    chat.until("Paris")
    chat.type("\x03")
    chat.until("stopped]")
    chat.until(">")
    chat.type("/help\r")
    chat.until("/clear")
    chat.until("Ctrl-C stops a reply.")
    chat.until(">")
    chat.type("\x03")
    chat.until("leaves", again="\x03")  # input() misses a signal between its prompt and its wait
    chat.until(">")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_pasted_text_is_one_message(demo_int4: Path, device: str, code: str, state: str) -> None:
    argv = ["chat", str(demo_int4), "--device", device, "--max-new-tokens", "4"]
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.paste("def f(x):\n    return x\n\nWhat is it?")
        chat.type("\r")
        chat.until("first token")
        chat.until(">")
        chat.type("/show\r")
        chat.until("user: def f(x):")
        chat.until("    return x")
        chat.until("What is it?")
        chat.until("assistant: ")
        chat.until("on CPU" if device == "CPU" else "on GPU")
        assert "user: " not in chat.seen


def test_a_message_can_have_several_lines(demo_int4: Path, device: str, code: str, state: str) -> None:
    argv = ["chat", str(demo_int4), "--device", device, "--max-new-tokens", "4"]
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        if code:
            chat.type('"""one\r')
            chat.until("... ")
            chat.type('  two"""\r')
        else:
            chat.type("one\x0a  two\r")
        chat.until("first token")
        chat.until(">")
        chat.type("/show\r")
        chat.until("user: one")
        chat.until("  two")
        chat.until("assistant: ")


def test_history_outlives_the_chat(demo_int4: Path, device: str, code: str, state: str) -> None:
    argv = ["chat", str(demo_int4), "--device", device]
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type("/set max_new_tokens 33\r")
        chat.until("Options:")
        chat.until(">")
        chat.type("\x04")
        assert chat.exit_code() == 0
    for file in Path(state).glob("chat_history*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type("\x1b[A")
        chat.until("max_new_tokens 33")
        chat.type("\r")
        chat.until("Options:")


def test_what_is_typed_during_a_reply_waits_for_the_next_prompt(
    demo_int4: Path, device: str, code: str, state: str
) -> None:
    argv = ["chat", str(demo_int4), "--device", device, "--ignore-eos", "--max-new-tokens", "60"]
    with Terminal(argv, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type(f"{CAPITAL}\r")
        chat.until("Paris")
        chat.type("/rewind xyz")
        chat.until("first token")
        chat.until(">")
        chat.until("/rewind xyz")
        chat.type("\r")
        chat.until("expected a number")


def test_typing_during_a_reply_is_not_shown_in_it(chat: Terminal) -> None:
    chat.until(">")
    chat.type(f"{CAPITAL}\r")
    chat.until("Paris")
    start = len(chat.raw)
    chat.type("qqqqq")
    for _ in range(5):
        chat.seen = ""
        chat._read()
    assert "q" not in chat.raw[start:].replace("question", "")


def test_commands_and_options_are_completed(demo_int4: Path, device: str, state: str) -> None:
    with Terminal(["chat", str(demo_int4), "--device", device], OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type("/re")
        chat.until("/retry")
        chat.until("/rewind")
        chat.type("\x03")
        chat.until(">")
        chat.type("/set tempe")
        chat.until("temperature")
        chat.type("\t")
        chat.until("rature")
        chat.type(" 0.5\r")
        chat.until("temperature 0.5")


def test_replies_are_rendered_as_markdown(demo_int4: Path, device: str, state: str) -> None:
    question = "Repeat: **bold** word"
    for flag, marks in (("", False), ("--plain", True)):
        argv = ["chat", str(demo_int4), "--device", device, "--regex", "say [*][*]bold[*][*] word", *flag.split()]
        with Terminal(argv, OV_PHI3_STATE=state) as chat:
            chat.until(">")
            chat.type(f"{question}\r")
            chat.until("say ")
            chat.until("first token")
            assert ("say **bold** word" in chat.raw) is marks
            assert ("\x1b[1mbold" in chat.raw) is not marks


def test_no_color_means_no_colour(demo_int4: Path, device: str, state: str) -> None:
    argv = ["chat", str(demo_int4), "--device", device, "--regex", "`code` and _more_"]
    with Terminal(argv, OV_PHI3_STATE=state, NO_COLOR="1") as chat:
        chat.until(">")
        chat.type("Say it.\r")
        chat.until("first token")
        chat.until(">")
        assert not [code for code in range(30, 50) if f"\x1b[{code}m" in chat.raw or f";{code}m" in chat.raw]
        assert "\x1b[2m" not in chat.raw


def test_replies_are_wrapped_between_words(demo_int4: Path, device: str, code: str, state: str) -> None:
    argv = ["chat", str(demo_int4), "--device", device, "--regex", "(abcdefg ){12}"]
    with Terminal(argv, columns=30, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        chat.type("Go on.\r")
        chat.until("prompt")
        assert "abcdefg abcdefg abcdefg\r\n" in chat.raw


def test_help_fits_a_narrow_terminal(demo_int4: Path, device: str, code: str, state: str) -> None:
    with Terminal(["chat", str(demo_int4), "--device", device], columns=40, code=code, OV_PHI3_STATE=state) as chat:
        chat.until(">")
        start = len(chat.raw)
        chat.type("/help\r")
        chat.until("a slash. Ctrl-C stops a reply.")
        plain = chat.raw[start:].replace("\x1b[2m", "").replace("\x1b[0m", "")
        lines = plain[plain.index("show the commands") :].splitlines()
        assert "/set [OPTION [VALUE]]" in lines
        assert max(map(len, lines)) <= 40


def test_a_long_prompt_shows_a_progress_bar(demo_int4: Path, device: str) -> None:
    options = ["--device", device, "--max-new-tokens", "4", "--prefill-chunk", "128"]
    with Terminal(["generate", str(demo_int4), "bread " * 500, *options]) as terminal:
        terminal.until("Reading the prompt [---")
        terminal.until("] 128 of 5")
        terminal.until("] 256 of 5")
        terminal.until("prompt tokens, 4 new")
        assert terminal.exit_code() == 0
