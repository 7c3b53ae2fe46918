"""Ray (extra `ray`): batches over a fleet with Ray Data, and OpenAI's API with Ray Serve.

Ray is imported when `deployment` is called, and `BatchGenerator` asks it only inside an actor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ov_phi3.serving.ray.batches import BatchGenerator
from ov_phi3.serving.ray.model_source import fetch_model

if TYPE_CHECKING:
    from ov_phi3.serving.ray.serve import deployment

__all__ = ["BatchGenerator", "deployment", "fetch_model"]


def __getattr__(name: str) -> Any:
    if name != "deployment":
        raise AttributeError(f"module 'ov_phi3.serving.ray' has no attribute {name!r}")
    from ov_phi3.serving.extras import check_installed

    check_installed("ray")
    from ov_phi3.serving.ray.serve import deployment

    return deployment
