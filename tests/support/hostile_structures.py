"""Runs hostile structures on one pipeline within a bound of memory, and prints a line for each."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "deep schema": {"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000},
    "large enum": {"json_schema": {"enum": [f"x{i}" * 10 for i in range(25000)]}},
    "many properties": {"json_schema": {"type": "object", "properties": {f"k{i}": {} for i in range(20000)}}},
    "circle": {"json_schema": {"$ref": "#"}},
    "two in a circle": {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                                        "$ref": "#/$defs/a"}},
    "repetitions": {"regex": "((a{1,100}){1,100}){1,100}"},
    "long repetition": {"regex": "[a-z]{1,1000000}"},
    "alternatives": {"regex": "(a|aa|aaa|aaaa)*" * 40},
    "nested stars": {"regex": "(" * 200 + "a" + ")*" * 200},
    "deep groups": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "left recursion": {"grammar": 'root ::= root root | "a"'},
    "deep grammar": {"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    "doubling": {"grammar": "root ::= a0\na40 ::= \"x\"" + "".join(f"\na{i} ::= a{i + 1} a{i + 1}" for i in range(40))},
}  # fmt: skip


def main() -> None:
    import ov_phi3

    model, backend = sys.argv[1:]
    with ov_phi3.load(model, device="CPU", backend=backend) as pipe:  # type: ignore[arg-type]
        with contextlib.suppress(ImportError):
            import resource

            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
            resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, resource.RLIM_INFINITY))
        for name, options in CASES.items():
            try:
                outcome = pipe.generate("x", max_new_tokens=6, **options).finish_reason
            except ov_phi3.ConfigError:
                outcome = "refused"
            usable = pipe.generate("x", max_new_tokens=2).finish_reason
            print(f"{name}: {outcome}, then {usable}", flush=True)


if __name__ == "__main__":
    main()
