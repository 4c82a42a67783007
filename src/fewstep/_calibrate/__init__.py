"""Calibration: fitting a sampler to one checkpoint."""

__all__: list[str] = []
