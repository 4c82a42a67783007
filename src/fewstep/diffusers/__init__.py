"""diffusers pipelines with fewstep's solvers, and fewstep on what is inside a pipeline.

pipe.scheduler = fewstep.diffusers.Scheduler.from_config(pipe.scheduler.config, solver="unipc")
model = fewstep.diffusers.denoiser(pipe, prompt="a lighthouse", guidance_scale=5.0)
recipe = fewstep.diffusers.calibrate(pipe, prompts=[...], nfe=[6, 8])
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'fewstep.diffusers needs diffusers: pip install "fewstep[diffusers]"'
    ) from error

from ._bundled import BundledUNet, pipeline
from ._pipeline import PipelineDenoiser, calibrate, denoiser
from ._scheduler import Scheduler, StepOutput

__all__ = [
    "BundledUNet",
    "PipelineDenoiser",
    "Scheduler",
    "StepOutput",
    "calibrate",
    "denoiser",
    "pipeline",
]
