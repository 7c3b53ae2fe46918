"""Memory bandwidth of a device."""

from __future__ import annotations

from ov_phi3.system.bandwidth import bandwidth


def test_the_bandwidth_is_plausible(device: str) -> None:
    assert 1e9 < bandwidth(device, repeat=3) < 1e13
