"""Group sizes that fit the widths of a model, and group sizes that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_models import CONFIG, write_json

from ov_phi3.errors import ConfigError
from ov_phi3.exporting.flags import combine
from ov_phi3.exporting.group_size import decide_group_size
from ov_phi3.model.config import Phi3Config


def decide(tmp_path: Path, flags: dict[str, Any], *, explicit: bool = False, **config: int) -> Any:
    write_json(tmp_path / "config.json", {**CONFIG, **config})
    return decide_group_size(combine("int4", flags), Phi3Config.read(tmp_path / "config.json"), explicit=explicit)


PHI3_MINI = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}


def test_a_group_size_that_fits(tmp_path: Path) -> None:
    decision = decide(tmp_path, {}, **PHI3_MINI)
    assert (decision.adjusted, decision.reason) == (False, "128 divides 3072, 3072, 8192.")


def test_the_group_size_of_the_recipe_is_adjusted(tmp_path: Path) -> None:
    decision = decide(
        tmp_path, {}, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    )
    assert decision.adjusted
    assert "128 does not divide hidden_size = 576" in decision.reason


def test_the_group_size_of_the_caller_is_refused_or_gets_a_fallback(tmp_path: Path) -> None:
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    with pytest.raises(ConfigError, match=r"hidden_size = 576.* Nearest sizes that fit: 16, 32, 64; or -1"):
        decide(tmp_path, {"group_size": 128}, explicit=True, **sizes)
    with pytest.raises(ConfigError):
        decide(tmp_path, {"group_size_fallback": "error"}, **sizes)
    decision = decide(tmp_path, {"group_size": 128, "group_size_fallback": "ignore"}, explicit=True, **sizes)
    assert (decision.adjusted, "was given" in decision.reason) == (False, True)
    assert not decide(tmp_path, {"group_size": 64}, explicit=True, **sizes).adjusted


def test_heads_wider_than_the_model(tmp_path: Path) -> None:
    decision = decide(tmp_path, {}, **{**PHI3_MINI, "head_dim": 100})
    assert "num_attention_heads x head_dim = 3200" not in decision.reason
    assert "num_attention_heads x head_dim = 3232" in decide(tmp_path, {}, **{**PHI3_MINI, "head_dim": 101}).reason


@pytest.mark.parametrize("flags", [{"group_size": -1}, {"weight_format": "int8"}, {"weight_format": "cb4"}])
def test_formats_without_groups(tmp_path: Path, flags: dict[str, Any]) -> None:
    assert decide(tmp_path, flags) is None
