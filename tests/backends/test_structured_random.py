"""Random structures on both backends with both vocabularies: what ends by itself is valid, or is refused before.

OV_PHI3_STRUCTURES is the number of cases of each small pipeline (default 20); the demo model runs a quarter of them.
"""

from __future__ import annotations

import os

import pytest
from structures import options_of_a_case, satisfies

from ov_phi3 import ConfigError, Pipeline

CASES = int(os.environ.get("OV_PHI3_STRUCTURES") or 20)


MOST_REFUSED = {"tiny_loop": 0.1, "loop": 0.1, "tiny_pipe": 0.5, "pipe": 0.5}


@pytest.mark.parametrize(("name", "most_refused"), MOST_REFUSED.items())
def test_random_structures(request: pytest.FixtureRequest, name: str, most_refused: float) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pipeline: Pipeline = request.getfixturevalue(name)
    ended = refused = 0
    cases = CASES if name.startswith("tiny") else max(1, CASES // 4)
    for seed in range(cases):
        options = options_of_a_case(seed)
        try:
            result = pipeline.generate("Say something.", max_new_tokens=120, **options)
        except ConfigError:
            refused += 1
            continue
        if result.finish_reason == "stop":
            ended += 1
            valid = satisfies(
                options,
                result.text,
                lambda value, schema: not list(jsonschema.Draft202012Validator(schema).iter_errors(value)),
            )
            assert valid, (seed, options, result.text)
    assert refused <= most_refused * cases
    assert ended > cases / 4
