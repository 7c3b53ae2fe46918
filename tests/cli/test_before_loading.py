"""Wrong options are named in the command line's words, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_phi3.cli import main
from ov_phi3.cli.options import OPTION_FLAGS, help_texts
from ov_phi3.cli.words import in_flags

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("the model is loaded", pytrace=False)

    monkeypatch.setattr("ov_phi3.load", load)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--temperature", "-1"], 2, "--temperature -1.0 is out of range"),
        (["generate", "x", "--top-p", "2"], 2, "--top-p 2.0"),
        (["generate", "x", "--do-sample", "--temperature", "0"], 2, "--do-sample contradicts --temperature 0"),
        (["generate", "x", "--no-do-sample", "--top-k", "5"], 2, "--no-do-sample contradicts --top-k 5"),
        (["generate", "x", "--json-whitespace"], 2, "--json-whitespace belongs to --json-schema"),
        (["generate", "x", "--num-beams", "2", "--top-logprobs", "1"], 2, "--top-logprobs 1 contradicts --num-beams 2"),
        (["generate", "x", "--num-return-sequences", "2"], 2, "--num-return-sequences 2 contradicts"),
        (
            ["generate", "x", "--max-new-tokens", "1000000"],
            2,
            "--max-new-tokens 1000000 does not fit the context window",
        ),
        (["generate", "x", "--context-length", "64", "--max-new-tokens", "64"], 2, "window of 64 tokens"),
        (["generate", "x", "--stop-token-ids", "99999999"], 2, "--stop-token-ids holds 99999999"),
        (["generate", "x", "--logit-bias", "99999999=1"], 2, "--logit-bias holds 99999999"),
        (["generate", "x", "--timeout", "0"], 2, "--timeout 0"),
        (["generate", "x", "--prefix", "nosuch.kv"], 1, "nosuch.kv does not exist"),
        (["generate", "x", "--prefix", "a.kv", "--system", "s"], 2, "--prefix and --system contradict"),
        (["generate", "x", "--backend", "llm_pipeline", "--top-logprobs", "1"], 2, "needs --backend infer_request"),
        (
            ["generate", "x", "--backend", "infer_request", "--assistant-confidence-threshold", "0.5"],
            2,
            "--backend llm_",
        ),
        (["generate", "x", "--ov-config", "NONSENSE"], 2, "--ov-config 'NONSENSE'"),
        (["generate", ""], 2, "the prompt is empty"),
        (["chat", "--num-beams", "4"], 2, "--num-beams 4 does not work in a chat"),
        (["chat", "--num-return-sequences", "2", "--temperature", "1"], 2, "--num-return-sequences 2 does not work"),
        (["chat", "--load", "nosuch.kv"], 1, "nosuch.kv does not exist"),
        (["chat", "--load", "a.kv", "--system", "s"], 2, "--load and --system contradict"),
        (["chat", "--load", "a.kv", "--prefix", "b.kv"], 2, "--load and --prefix contradict"),
        (["bench", "--prompt-tokens", "0"], 2, "--prompt-tokens 0"),
        (["bench", "--repeat", "0"], 2, "--repeat 0"),
        (["bench", "--chat-turns", "-1"], 2, "--chat-turns -1"),
    ],
)
def test_a_wrong_option_is_named_before_loading(
    demo_int4: Path, capsys: Captured, arguments: list[str], code: int, message: str
) -> None:
    command, *rest = arguments
    assert main([command, str(demo_int4), *rest]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max-tokens", "--max-tokens, which is called --max-new-tokens here"),
        ("--temp", "did you mean --temperature?"),
        ("--rng-seed", "which is called --seed here"),
        ("--topk", "did you mean --top-k?"),
        ("--zzz", "unknown flag --zzz"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "m", "x", flag, "5"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 3  # a usage of two lines, and the message


def test_a_stray_argument_is_explained(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "m", "what", "is"])
    assert "unexpected argument 'is'; put a text of several words in quotes" in capsys.readouterr().err


def test_help_texts_are_whole() -> None:
    for name, text in help_texts().items():
        if name in OPTION_FLAGS:
            assert text.count("(") == text.count(")") or "1)" in text or "0, 1]" in text, (name, text)
            assert "`" not in text
            assert not text.rstrip(".").endswith((" in", " to", " the", " of", "*", " at least", ",", " the next")), (
                text
            )
    assert help_texts()["xtc_probability"].endswith("#6335).")


def test_help_prints_whole_texts(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: ov-phi3 generate MODEL [PROMPT] [flags]\n")
    assert "#6335)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("top_p=2.0; expected 0 to 1.", "--top-p 2.0; expected 0 to 1."),
        ("stop holds an empty string, no stop string", "--stop holds an empty string, no stop string"),
        ("stop=('###',) with num_beams=2", "--stop '###' with --num-beams 2"),
        ("stop=('a b', 'c') contradicts", "--stop ('a b', 'c') contradicts"),
        ("a seed of the sampling", "a seed of the sampling"),
        ("the file 'top_p' is not there", "the file 'top_p' is not there"),
    ],
)
def test_messages_speak_of_flags(message: str, expected: str) -> None:
    assert in_flags(message, OPTION_FLAGS) == expected
