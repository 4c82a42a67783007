"""fewstep in ComfyUI: solvers, grids and recipes as SAMPLER and SIGMAS nodes."""

import os

try:
    import fewstep  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the fewstep nodes need the fewstep package in ComfyUI's own Python: pip install fewstep"
    ) from error

from .nodes import FewstepRecipe, FewstepSampler, FewstepSigmas, register

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS = {
    "FewstepSampler": FewstepSampler,
    "FewstepSigmas": FewstepSigmas,
    "FewstepRecipe": FewstepRecipe,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FewstepSampler": "fewstep sampler",
    "FewstepSigmas": "fewstep sigmas",
    "FewstepRecipe": "fewstep recipe",
}

if chosen := os.environ.get("FEWSTEP_KSAMPLER"):
    register(chosen)
