"""GenAI's tokenizer without the tables that encode text still decodes and knows the special tokens."""

import re
import shutil
from pathlib import Path

import pytest

from ov_phi3 import ModelError, ModelInfo
from ov_phi3.backends.genai_tokenizer import genai_tokenizer_arguments


@pytest.mark.parametrize("can_encode", [False, True])
def test_it_decodes_and_knows_the_special_tokens(tiny_fp32: Path, can_encode: bool) -> None:
    import openvino_genai

    added = {token.id: token.content for token in ModelInfo.from_dir(tiny_fp32).added_tokens}
    tokenizer = openvino_genai.Tokenizer(*genai_tokenizer_arguments(tiny_fp32, added, can_encode=can_encode))
    whole = openvino_genai.Tokenizer(str(tiny_fp32))
    assert tokenizer.decode([15043]) == whole.decode([15043]) == "Hello"
    assert tokenizer.get_eos_token_id() == whole.get_eos_token_id()
    controls = {content.encode() for content in added.values()}
    texts = {literal(piece) for piece in whole.get_vocab() if piece not in controls}
    assert set(tokenizer.get_vocab()) == {b"", *texts}
    assert b"<|end|>" in controls


def literal(piece: bytes) -> bytes:
    """What a piece of SentencePiece's means in a text."""
    byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1].decode()) if byte else piece.replace("▁".encode(), b" ")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, tiny_fp32: Path) -> None:
    with pytest.raises(ModelError, match=r"openvino_detokenizer\.xml could not be read"):
        genai_tokenizer_arguments(tmp_path, can_encode=False)
    for name in ("openvino_detokenizer.xml", "openvino_detokenizer.bin"):
        shutil.copy(tiny_fp32 / name, tmp_path / name)
    with pytest.raises(ModelError, match="could not be read"):
        genai_tokenizer_arguments(tmp_path, can_encode=False)
