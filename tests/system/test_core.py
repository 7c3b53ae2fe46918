"""The import of OpenVINO, and its one Core."""

from __future__ import annotations

import subprocess
import sys

from ov_phi3.system.core import import_genai, import_openvino, shared_core


def test_the_accessors_return_the_modules() -> None:
    import openvino
    import openvino_genai

    assert import_openvino() is openvino
    assert import_genai() is openvino_genai


def test_there_is_one_core() -> None:
    assert shared_core() is shared_core()


def test_the_first_import_leaves_telemetry_out() -> None:
    code = (
        "import sys; from ov_phi3.system.core import import_genai; import_genai()\n"
        "sys.exit('openvino_telemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
