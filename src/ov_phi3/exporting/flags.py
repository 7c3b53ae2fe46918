"""Recipes, and the flags of `optimum-cli export openvino` as keyword arguments with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.exporting.calibration import PYTHON_DOCS, check_dataset

__all__ = [
    "FLAGS",
    "RECIPES",
    "REFUSED",
    "TASK",
    "ExportFlags",
    "Flag",
    "Flags",
    "Recipe",
    "RecipeName",
    "arguments",
    "combine",
]

TASK = "text-generation-with-past"

Flags = dict[str, Any]
"""Value by flag name (with underscores); True for a switch."""

RecipeName: TypeAlias = Literal["int4", "int4-max", "int4-calibrated", "int8", "fp16", "fp32"]
"""A set of flags, see `export`."""

_WeightFormat: TypeAlias = Literal["fp32", "fp16", "int8", "int4", "mxfp4", "nf4", "cb4"]
_QuantMode: TypeAlias = Literal["int8", "f8e4m3", "f8e5m2", "cb4_f8e4m3", "int4_f8e4m3", "int4_f8e5m2"]
_GroupSizeFallback: TypeAlias = Literal["error", "ignore", "adjust"]
_BackupPrecision: TypeAlias = Literal["none", "int8_sym", "int8_asym"]
_SensitivityMetric: TypeAlias = Literal[
    "weight_quantization_error",
    "hessian_input_activation",
    "mean_activation_variance",
    "max_activation_variance",
    "mean_activation_magnitude",
]
_Framework: TypeAlias = Literal["pt"]
_Library: TypeAlias = Literal["transformers"]


class ExportFlags(TypedDict, total=False):
    """The keyword arguments `**flags` of `export`: flags of `optimum-cli export openvino`, as in `FLAGS`.

    None removes a flag of the recipe, False a switch.
    """

    weight_format: _WeightFormat | None
    quant_mode: _QuantMode | None
    ratio: float | None
    sym: bool | None
    group_size: int | None
    group_size_fallback: _GroupSizeFallback | None
    backup_precision: _BackupPrecision | None
    dataset: str | None
    all_layers: bool | None
    awq: bool | None
    scale_estimation: bool | None
    gptq: bool | None
    lora_correction: bool | None
    sensitivity_metric: _SensitivityMetric | None
    quantization_statistics_path: str | None
    num_samples: int | None
    smooth_quant_alpha: float | None
    cache_dir: str | None
    pad_token_id: int | None
    variant: str | None
    model_kwargs: dict[str, Any] | None
    framework: _Framework | None
    library: _Library | None


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of `optimum-cli export openvino`.

    Attributes:
        kind: type of the value; bool for a switch.
        choices: the accepted values; () if any value of the type is accepted.
        option: spelling on the command line, if it is not the name with dashes.
    """

    kind: type
    choices: tuple[str, ...] = ()
    option: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named set of flags.

    Attributes:
        name: the value of `export(recipe=...)`.
        summary: a line for the help text.
        flags: the flags.
    """

    name: str
    summary: str
    flags: Mapping[str, Any]


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "int4",
            "60 % of the layers int4, the rest int8; that of the cookbook",
            {"weight_format": "int4", "group_size": 128, "ratio": 0.6, "sym": True},
        ),
        Recipe(
            "int4-max",
            "all layers int4: smallest and fastest",
            {"weight_format": "int4", "group_size": 128, "ratio": 1.0, "sym": True},
        ),
        Recipe(
            "int4-calibrated",
            "all layers int4, scales fitted to a text: as small, and better; takes longer to export",
            {
                "weight_format": "int4",
                "group_size": 128,
                "ratio": 1.0,
                "sym": True,
                "scale_estimation": True,
                "dataset": PYTHON_DOCS,
                "num_samples": 64,
            },
        ),
        Recipe("int8", "all weights int8", {"weight_format": "int8"}),
        Recipe("fp16", "weights float16, not quantised", {"weight_format": "fp16"}),
        Recipe("fp32", "weights float32, for comparisons", {"weight_format": "fp32"}),
    )
}

_4BIT = ("int4", "mxfp4", "nf4", "cb4")
_MIXED_MODES = ("cb4_f8e4m3", "int4_f8e4m3", "int4_f8e5m2")

FLAGS: Mapping[str, Flag] = {
    "weight_format": Flag(str, get_args(_WeightFormat)),
    "quant_mode": Flag(str, get_args(_QuantMode)),
    "ratio": Flag(float),
    "sym": Flag(bool),
    "group_size": Flag(int),
    "group_size_fallback": Flag(str, get_args(_GroupSizeFallback)),
    "backup_precision": Flag(str, get_args(_BackupPrecision)),
    "dataset": Flag(str),
    "all_layers": Flag(bool),
    "awq": Flag(bool),
    "scale_estimation": Flag(bool),
    "gptq": Flag(bool),
    "lora_correction": Flag(bool),
    "sensitivity_metric": Flag(str, get_args(_SensitivityMetric)),
    "quantization_statistics_path": Flag(str),
    "num_samples": Flag(int),
    "smooth_quant_alpha": Flag(float),
    "cache_dir": Flag(str, option="--cache_dir"),
    "pad_token_id": Flag(int),
    "variant": Flag(str),
    "model_kwargs": Flag(dict),
    "framework": Flag(str, get_args(_Framework)),
    "library": Flag(str, get_args(_Library)),
}
"""The flags that `export` passes on. A test compares them with `optimum-cli export openvino --help`."""

REFUSED: Mapping[str, str] = {
    "task": f"it is always {TASK!r}, the only task whose models have a KV cache",
    "disable_stateful": "both backends need the KV cache as a state of the model",
    "disable_convert_tokenizer": "the library needs the converted tokenizer",
    "model": "it is the first argument, source",
    "output": "it is the second argument",
    "help": "see `optimum-cli export openvino --help`",
    "revision": "optimum-cli has no such flag; download that revision and pass its directory as the source",
}
"""Flags of optimum-cli that `export` does not pass on, with the reason."""

_QUANTISED_ONLY = frozenset(FLAGS) - {
    "weight_format", "cache_dir", "pad_token_id", "variant", "model_kwargs", "framework", "library",
}  # fmt: skip
_ACTIVATIONS_ONLY = frozenset({"smooth_quant_alpha"})
_DATA_AWARE = ("scale_estimation", "gptq", "lora_correction")
_4BIT_ONLY = _QUANTISED_ONLY - _ACTIVATIONS_ONLY - {"quant_mode", "sym"}


def combine(recipe: str, flags: Mapping[str, Any]) -> Flags:
    """A recipe's flags with the caller's flags over them.

    None or False removes a flag of the recipe. Another `weight_format`, or a `quant_mode`, removes all other flags of
    the recipe, because they belong to the recipe's format.

    Raises:
        ConfigError: an unknown recipe or flag, a value out of range, or a flag that optimum-cli would ignore.
        TypeError: a value of a wrong type.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"recipe is {recipe!r}; expected one of {', '.join(RECIPES)}.{did_you_mean(recipe, RECIPES)}")
    for name, value in flags.items():
        _check_flag(name, value)
    base = dict(RECIPES[recipe].flags)
    if flags.get("quant_mode") or flags.get("weight_format", base["weight_format"]) != base["weight_format"]:
        base = {}
    combined = {name: value for name, value in {**base, **flags}.items() if value is not None and value is not False}
    _check_together(combined)
    if "dataset" in combined:
        combined["dataset"] = check_dataset(combined["dataset"])
    return combined


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags as command-line arguments."""
    result: list[str] = []
    for name, value in flags.items():
        result.append(FLAGS[name].option or "--" + name.replace("_", "-"))
        if value is not True:
            result.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return result


def _check_flag(name: str, value: object) -> None:
    if name in REFUSED:
        raise ConfigError(f"{name} cannot be set: {REFUSED[name]}.")
    if name not in FLAGS:
        suggestion = did_you_mean(name, FLAGS)
        raise ConfigError(
            f"{name!r} is not a flag of `optimum-cli export openvino`.{suggestion} Valid: {', '.join(FLAGS)}."
        )
    flag = FLAGS[name]
    if value is None:
        return
    accepted = (int, float) if flag.kind is float else (flag.kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and flag.kind is not bool):
        raise TypeError(f"{name} is {value!r}; expected {flag.kind.__name__} or None, not {type(value).__name__}")
    if flag.choices and value not in flag.choices:
        suggestion = did_you_mean(str(value), flag.choices)
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(flag.choices)}.{suggestion}")
    _check_range(name, value)


def _check_range(name: str, value: Any) -> None:
    if name == "ratio" and not 0 < value <= 1:
        raise ConfigError(f"ratio is {value}; expected the fraction of layers in 4 bits, above 0 and at most 1.")
    if name == "group_size" and value != -1 and value < 1:
        raise ConfigError(
            f"group_size is {value}; expected a positive number such as 128, or -1 for one group per row."
        )
    if name == "num_samples" and value < 1:
        raise ConfigError(f"num_samples is {value}; expected at least 1.")
    if name in ("dataset", "quantization_statistics_path", "cache_dir", "variant") and not value:
        raise ConfigError(f"{name} is empty; expected text, or None to leave it out.")


def _check_together(flags: Flags) -> None:
    mode, weights = flags.get("quant_mode"), flags.get("weight_format")
    if mode is None and weights is None:
        raise ConfigError("weight_format is None; expected one of " + ", ".join(FLAGS["weight_format"].choices) + ".")
    if mode is not None and weights is not None:
        raise ConfigError(f"weight_format {weights!r} and quant_mode {mode!r} exclude each other; pass one of them.")
    if mode is not None and "dataset" not in flags:
        raise ConfigError(f"quant_mode {mode!r} needs a dataset to calibrate with, such as dataset='wikitext2'.")
    ignored = _without_effect(mode, weights) & flags.keys()
    if ignored:
        raise ConfigError(
            f"{', '.join(sorted(ignored))}: no effect with {'quant_mode' if mode else 'weight_format'} "
            f"{mode or weights!r}, and optimum-cli would ignore it. Leave it out, or choose a 4-bit weight_format."
        )
    for name in (*_DATA_AWARE, "num_samples"):
        if name in flags and "dataset" not in flags:
            raise ConfigError(f"{name} needs a dataset to measure activations with, such as dataset='wikitext2'.")
    if (
        weights in _4BIT
        and "dataset" in flags
        and flags.get("ratio", 1) == 1
        and not flags.keys() & {"awq", *_DATA_AWARE}
    ):
        raise ConfigError(
            "dataset has no effect: all layers are in 4 bits (ratio 1) and no algorithm uses it. Leave it out, or add "
            "awq, scale_estimation, gptq or lora_correction."
        )
    if weights == "mxfp4" and flags.get("group_size", 32) != 32:
        raise ConfigError(f"group_size is {flags['group_size']}; expected 32, the only size for mxfp4.")


def _without_effect(mode: str | None, weights: str | None) -> frozenset[str]:
    """Flags that optimum-cli accepts but ignores with a mode or a format (see its function `prepare_wc_config`)."""
    if mode in _MIXED_MODES:
        return frozenset()
    if mode is not None:
        return _4BIT_ONLY - {"dataset", "num_samples"}
    if weights in ("fp16", "fp32"):
        return _QUANTISED_ONLY
    return _ACTIVATIONS_ONLY | (_4BIT_ONLY if weights == "int8" else frozenset())
