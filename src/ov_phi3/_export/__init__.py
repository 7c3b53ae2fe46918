"""The steps of an export: `flags`, `source`, `child` (optimum-cli), `verify`; `ov_phi3.export` puts them together."""
