"""Recipes and flags, as keyword arguments and as arguments of optimum-cli."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from exporter import needs_exporter

from ov_phi3.errors import ConfigError
from ov_phi3.exporting.flags import FLAGS, RECIPES, REFUSED, arguments, combine
from ov_phi3.exporting.job import OPTIMUM_CLI


@needs_exporter
def test_the_flags_equal_those_of_optimum_cli() -> None:
    command = [sys.executable, "-c", OPTIMUM_CLI, "export", "openvino", "--help"]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
    ).stdout
    real = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text.partition("options:")[0]))
    real -= {"model", "task", "trust-remote-code"}
    real |= {option for option in ("disable-stateful",) if option in text}
    own = {(flag.option or "--" + name.replace("_", "-"))[2:] for name, flag in FLAGS.items()}
    assert own == real - {name.replace("_", "-") for name in REFUSED}
    for name, flag in FLAGS.items():
        choices = re.search(rf"--{name.replace('_', '.')} {{([^}}]*)}}", text)
        if choices and name != "library":
            assert flag.choices == tuple(choices[1].split(",")), name


def test_arguments_of_the_recipes() -> None:
    cookbook = "--weight-format int4 --group-size 128 --ratio 0.6 --sym"
    assert " ".join(arguments(combine("int4", {}))) == cookbook
    assert " ".join(arguments(combine("int4-max", {}))) == cookbook.replace("0.6", "1.0")
    calibrated = f"{cookbook.replace('0.6', '1.0')} --scale-estimation --dataset python-docs --num-samples 64"
    assert " ".join(arguments(combine("int4-calibrated", {}))) == calibrated
    for name in ("int8", "fp16", "fp32"):
        assert arguments(combine(name, {})) == ["--weight-format", name]
    assert all(recipe.name == name and recipe.summary for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"group_size": 64, "awq": True}, "--weight-format int4 --group-size 64 --ratio 0.6 --sym --awq"),
        ({"sym": False}, "--weight-format int4 --group-size 128 --ratio 0.6"),
        ({"ratio": None, "group_size": -1}, "--weight-format int4 --group-size -1 --sym"),
        ({"weight_format": "int4"}, "--weight-format int4 --group-size 128 --ratio 0.6 --sym"),
        ({"weight_format": "nf4"}, "--weight-format nf4"),
        ({"ratio": 1, "cache_dir": "x y"}, "--weight-format int4 --group-size 128 --ratio 1 --sym --cache_dir x y"),
        ({"quant_mode": "int8", "dataset": "wikitext2"}, "--quant-mode int8 --dataset wikitext2"),
        ({"model_kwargs": {"a": 1}}, '--weight-format int4 --group-size 128 --ratio 0.6 --sym --model-kwargs {"a": 1}'),
    ],
)
def test_flags_add_to_the_recipe_or_replace_its_flags(flags: dict[str, Any], expected: str) -> None:
    assert " ".join(arguments(combine("int4", flags))) == expected


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        (
            "int5",
            {},
            "recipe is 'int5'; expected one of int4, int4-max, int4-calibrated, int8, fp16, fp32. Did you mean",
        ),
        ("int4", {"groupsize": 64}, "'groupsize' is not a flag .* Did you mean 'group_size'"),
        ("int4", {"task": "text-generation"}, "task cannot be set"),
        ("int4", {"revision": "main"}, "revision cannot be set: .* download that revision"),
        ("int4", {"disable_stateful": True}, "disable_stateful cannot be set"),
        ("int4", {"weight_format": "int3"}, "weight_format is 'int3'; expected one of fp32"),
        ("int4", {"weight_format": None}, "weight_format is None"),
        ("int4", {"ratio": 0}, "ratio is 0"),
        ("int4", {"ratio": 1.5}, "ratio is 1.5"),
        ("int4", {"group_size": 0}, "group_size is 0"),
        ("int4", {"dataset": ""}, "dataset is empty"),
        (
            "int4",
            {"dataset": "wikitext3"},
            "dataset is 'wikitext3'; expected a text file, 'python-docs', or one of auto",
        ),
        ("int4", {"gptq": True}, "gptq needs a dataset"),
        ("int4", {"num_samples": 5}, "num_samples needs a dataset"),
        ("int4-max", {"dataset": "c4"}, "dataset has no effect"),
        ("int4", {"smooth_quant_alpha": 0.5}, "smooth_quant_alpha: no effect"),
        ("int8", {"group_size": 64, "ratio": 0.5}, "group_size, ratio: no effect with weight_format 'int8'"),
        ("fp16", {"sym": True}, "sym: no effect with weight_format 'fp16'"),
        ("int4", {"weight_format": "mxfp4", "group_size": 64}, "expected 32"),
        ("int4", {"quant_mode": "int8"}, "needs a dataset"),
        ("int4", {"quant_mode": "int8", "dataset": "c4", "ratio": 0.5}, "ratio: no effect with quant_mode 'int8'"),
        ("int4", {"quant_mode": "int8", "weight_format": "int4"}, "exclude each other"),
    ],
)
def test_refused_flags(recipe: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combine(recipe, flags)


@pytest.mark.parametrize(
    "flags",
    [{"group_size": "64"}, {"group_size": True}, {"ratio": "x"}, {"awq": 1}, {"dataset": 3}, {"model_kwargs": "{}"}],
)
def test_flags_of_a_wrong_type(flags: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(flags))} is .*; expected"):
        combine("int4", flags)
