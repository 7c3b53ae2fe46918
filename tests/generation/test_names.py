"""The tables of names cover openvino_genai's fields and our options, each exactly once."""

from ov_phi3 import GenerationConfig
from ov_phi3.generation import names
from ov_phi3.generation.config import INFER_REQUEST_OPTIONS


def test_every_field_of_genai_has_an_option_or_a_reason() -> None:
    import openvino_genai

    config = openvino_genai.GenerationConfig
    fields = {n for n in dir(config) if not n.startswith("_") and not callable(getattr(config, n))}
    assert fields == set(names.GENAI) | set(names.GENAI_UNSUPPORTED)
    assert not set(names.GENAI) & set(names.GENAI_UNSUPPORTED)


def test_every_option_is_genais_or_of_infer_request() -> None:
    ours = {name for value in names.GENAI.values() for name in value.split(", ")}
    assert ours | set(INFER_REQUEST_OPTIONS) == set(GenerationConfig.__dataclass_fields__)
    assert not ours & set(INFER_REQUEST_OPTIONS)
