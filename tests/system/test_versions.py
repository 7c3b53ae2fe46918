"""The three OpenVINO packages have to be of one release."""

from __future__ import annotations

import pytest

from ov_phi3.errors import DeviceError
from ov_phi3.system import versions


def test_versions_here_fit() -> None:
    assert set(versions.installed()) == {"openvino", "openvino-genai", "openvino-tokenizers"}
    versions.check()


def test_versions_of_one_release() -> None:
    versions.check({"openvino": "2026.4.1-9-x", "openvino-genai": "2026.4.1.0", "openvino-tokenizers": "2026.4.1.0rc1"})


@pytest.mark.parametrize("genai", ["2026.10.0.0", "2026.4.0.0", None])
def test_versions_that_do_not_fit(genai: str | None) -> None:
    with pytest.raises(DeviceError) as caught:
        versions.check({"openvino": "2026.4.1", "openvino-genai": genai, "openvino-tokenizers": "2026.4.1.0"})
    newest = "2026.10.0" if genai == "2026.10.0.0" else "2026.4.1"
    assert f"openvino-genai {genai or '(not installed)'}" in str(caught.value)
    assert f'pip install "openvino=={newest}.*" "openvino-genai=={newest}.*"' in str(caught.value)


def test_versions_without_any() -> None:
    with pytest.raises(DeviceError, match="pip install openvino openvino-genai openvino-tokenizers"):
        versions.check({})
