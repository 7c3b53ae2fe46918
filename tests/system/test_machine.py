"""The machine that figures are measured on: CPU, cores, package versions, memory of this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ov_phi3
from ov_phi3 import Machine
from ov_phi3.system.machine import cpu_name, physical_cores
from ov_phi3.system.memory import peak_memory_bytes, resident_memory_bytes


class TestMachine:
    """The machine that a report names."""

    def test_this_machine(self) -> None:
        here = Machine.here()
        assert here.logical_cpus >= 1
        assert here.packages["ov-phi3"] == ov_phi3.__version__
        assert here.packages["openvino"]
        assert json.loads(json.dumps(here.to_dict()))["cpu"] == here.cpu

    def test_physical_cores_are_counted_apart_from_threads(self) -> None:
        cpuinfo = "\n\n".join(
            f"processor : {n}\nmodel name : Some CPU\nphysical id : 0\ncore id : {n // 2}" for n in range(8)
        )
        assert physical_cores(cpuinfo.replace(" :", "\t:")) == 4
        assert physical_cores("processor : 0\nmodel name : x") is None
        assert cpu_name("model name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"

    def test_peak_memory_grows_with_an_allocation(self) -> None:
        before, resident = peak_memory_bytes(), resident_memory_bytes()
        if before is None or resident is None:
            pytest.skip("this system does not report memory")
        block = np.ones(resident // 8 + 2**25, np.float64)
        after = peak_memory_bytes()
        assert after is not None
        assert after >= block.nbytes
        assert after >= before
