"""One thread, fixed seeds, no network: the same outcome on every machine."""

from __future__ import annotations

import os

# Before any library reads them; processes that tests start inherit them.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CPDLM_TEST_GPUS", ""),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
for name in ("MLFLOW_TRACKING_URI", "CPDLM_COMMIT"):
    os.environ.pop(name, None)

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
