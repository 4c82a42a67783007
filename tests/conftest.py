"""One thread per test process: pytest-xdist already fills the cores, and torch's own threads on top
of that make tiny tensors many times slower."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
