"""The limit that memory bandwidth sets to decoding."""

from __future__ import annotations

from pathlib import Path

import pytest

import ov_phi3
from ov_phi3 import Roofline
from ov_phi3.bench.roofline import weight_bytes_per_token


class TestRoofline:
    """The bytes that a token reads, and the limit that follows from them."""

    def test_tied_embeddings_count_in_full_and_untied_ones_with_one_row(self, demo_int4: Path, tiny_fp32: Path) -> None:
        demo, tiny = (weight_bytes_per_token(path / "openvino_model.xml") for path in (demo_int4, tiny_fp32))
        size = (demo_int4 / "openvino_model.bin").stat().st_size
        assert size * 0.99 < demo <= size
        # tiny: of the 32064 rows of 64 numbers of the input embedding, a token reads one
        assert tiny == pytest.approx((tiny_fp32 / "openvino_model.bin").stat().st_size - 32063 * 64 * 4, abs=65536)

    def test_an_unreadable_xml_file_raises_model_error(self, tmp_path: Path) -> None:
        (tmp_path / "openvino_model.xml").write_text("<net")
        with pytest.raises(ov_phi3.ModelError, match="cannot be read"):
            weight_bytes_per_token(tmp_path / "openvino_model.xml")

    def test_limit_and_fraction_follow_from_bytes_and_bandwidth(self) -> None:
        limit = Roofline(bandwidth_bytes_per_s=1e9, weight_bytes=10**7, kv_bytes_per_token=1000.0)
        assert limit.bytes_at(0) == 1e7
        assert limit.limit_ms(0) == pytest.approx(10.0)
        assert limit.limit_ms(1000) == pytest.approx(11.0)
        assert limit.fraction(20.0, 0) == pytest.approx(0.5)

    def test_the_fraction_is_the_limit_divided_by_the_median_tpot(self, report: ov_phi3.Report) -> None:
        assert report.roofline is not None
        for m in report:
            assert m.roofline_fraction is not None
            assert m.tpot_ms is not None
            expected = report.roofline.limit_ms(m.prompt_tokens + 6) / m.tpot_ms
            assert m.roofline_fraction == pytest.approx(expected)
