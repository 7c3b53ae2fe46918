"""Pairs of generation options that contradict each other.

Options are checked twice: as they were given (`check`, by the constructor of `GenerationConfig`), and with the model's
own options and the defaults filled in (`check_resolved`, by a request). Each error names both options. What only one of
the backends cannot do is checked in its `unsupported`.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from ov_phi3.errors import ConfigError

__all__ = ["ASSISTED", "BEAMS", "PARTS", "SAMPLING", "STRUCTURED", "check", "check_resolved", "contradiction"]

_Options: TypeAlias = Any  # a GenerationConfig, whose module imports this one

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability")
"""Options of sampling."""

BEAMS = ("num_beam_groups", "diversity_penalty", "length_penalty", "stop_criteria")
"""Options of beam search, besides the number of beams."""

STRUCTURED = ("json_schema", "regex", "grammar")
"""Options that give the reply a structure."""

ASSISTED = ("num_assistant_tokens", "assistant_confidence_threshold")
"""Options of speculative decoding."""

PARTS = {
    "dry_multiplier": ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    "xtc_probability": ("xtc_threshold",),
}
"""Option that turns something on -> options that only change it."""


def contradiction(option: str, other: str, reason: str) -> ConfigError:
    """The error for two options that contradict each other, each as "name=value"."""
    return ConfigError(f"{option} contradicts {other}: {reason}.")


def check(config: _Options) -> None:
    """Refuse options that contradict each other, as they were given.

    Raises:
        ConfigError: two options contradict each other.
    """
    _check_sampling(config)
    _check_counts(config)
    structures = config.in_use(STRUCTURED)
    if len(structures) > 1:
        raise contradiction(structures[0], structures[1], "a reply follows one structure; give one of them")
    if structures and (config.num_beams or 1) > 1:
        raise contradiction(structures[0], config.show("num_beams"), "structured replies are sampled or greedy")
    if config.num_assistant_tokens is not None and config.assistant_confidence_threshold is not None:
        raise contradiction(*ASSISTED, "give the number of candidates or their confidence")
    if config.stop_on_loop is not None and (config.num_beams or 1) > 1:
        raise contradiction(config.show("stop_on_loop"), config.show("num_beams"), "beams end by their scores")
    for main, parts in PARTS.items():
        changed = config.in_use(parts)
        if changed and not getattr(config, main):
            raise ConfigError(f"{config.show(changed[0])} belongs to {main}: give that too, above 0.")
    if config.speculation == "auto" and config.num_assistant_tokens is not None:
        reason = '"auto" chooses the number; leave one of them out'
        raise contradiction(config.show("speculation"), config.show("num_assistant_tokens"), reason)
    if config.max_ngram_size is not None and config.num_assistant_tokens is None:
        raise ConfigError("max_ngram_size belongs to prompt lookup: give num_assistant_tokens too.")
    if config.json_whitespace is not None and config.json_schema is None:
        raise ConfigError(f"{config.show('json_whitespace')} belongs to json_schema: give a schema too.")


def check_resolved(config: _Options) -> None:
    """Refuse options that contradict each other, with every option filled in.

    Raises:
        ConfigError: two options contradict each other.
    """
    if not config.is_multi_sequence:
        return
    several = config.show("num_beams" if (config.num_beams or 1) > 1 else "num_return_sequences")
    if config.top_logprobs is not None:
        raise contradiction(config.show("top_logprobs"), several, "each reply has its score instead; ask for one reply")
    if (config.num_beams or 1) == 1:
        return
    if assisted := config.in_use(ASSISTED):
        raise contradiction(config.show(assisted[0]), several, "speculative decoding is for one reply at a time")
    if options := config.logit_options:
        raise contradiction(options[0], several, "beams are compared by the model's own scores")
    if (config.num_beam_groups or 1) > 1 and not config.diversity_penalty:
        reason = "without a penalty above 0 all groups find the same beams"
        raise contradiction(config.show("num_beam_groups"), config.show("diversity_penalty"), reason)


def _check_sampling(config: _Options) -> None:
    """Check sampling against greedy decoding and beam search."""
    beams, sampling = config.num_beams or 1, config.in_use(SAMPLING)
    if config.do_sample and config.temperature == 0:
        raise contradiction("do_sample=True", "temperature=0", "temperature 0 is greedy; leave one of them out")
    if config.samples is False and (useless := [name for name in sampling if getattr(config, name) != 0]):
        greedy = "do_sample=False" if config.do_sample is False else "temperature=0"
        raise contradiction(greedy, config.show(useless[0]), "a greedy reply does not sample; leave one of them out")
    if beams > 1 and config.samples:
        other = config.show((sampling or ["do_sample" if config.do_sample else "temperature"])[0])
        raise contradiction(f"num_beams={beams}", other, "beam search does not sample; leave one of them out")
    if beams == 1 and (useless := config.in_use(BEAMS)):
        reason = "it works with beam search only; set num_beams"
        raise contradiction(config.show(useless[0]), "num_beams=1", reason)


def _check_counts(config: _Options) -> None:
    """Check numbers of tokens, beams and sequences."""
    if config.max_new_tokens is not None and config.max_length is not None:
        raise contradiction(config.show("max_new_tokens"), config.show("max_length"), "give one of them")
    if (config.min_new_tokens or 0) > (config.max_new_tokens or math.inf):
        reason = "the minimum is above the maximum"
        raise contradiction(config.show("min_new_tokens"), config.show("max_new_tokens"), reason)
    beams, groups, sequences = config.num_beams or 1, config.num_beam_groups or 1, config.num_return_sequences or 1
    if beams % groups:
        raise contradiction(f"num_beams={beams}", f"num_beam_groups={groups}", "the groups must divide the beams")
    if config.in_use(["diversity_penalty"]) and groups == 1:
        raise contradiction(config.show("diversity_penalty"), "num_beam_groups=1", "it works between groups")
    if sequences > 1 and beams == 1 and config.samples is False:
        raise contradiction(f"num_return_sequences={sequences}", "greedy", "greedy replies are all the same")
    if beams > 1 and sequences > beams:
        raise contradiction(f"num_return_sequences={sequences}", f"num_beams={beams}", "there are not that many beams")
