"""`python -m ov_phi3` is the `ov-phi3` command."""

from ov_phi3.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
