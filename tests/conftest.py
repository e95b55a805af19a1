"""One thread, fixed seeds, no network: the same outcome on every machine."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
from made_records import suite, wider

from experiments import records
from experiments.cost import CostModel
from experiments.report import Report, render

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up records of all kinds that the report shows."""
    root = tmp_path_factory.mktemp("results")
    for content in [*suite(seeds=2), *wider(seeds=2)]:
        records.write(content, root / content["claim"])
    return root


@pytest.fixture(scope="session")
def drawn(made_results: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The report on them: (folder, report)."""
    folder = tmp_path_factory.mktemp("figures")
    return folder, render(made_results, folder)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models of other architectures, as folders by their names in `made_pretrained.SHAPES`."""
    from made_pretrained import SHAPES, saved

    return {name: saved(shape, tmp_path_factory.mktemp("model")) for name, shape in SHAPES.items()}


@pytest.fixture(scope="session")
def committed() -> list[records.Record]:
    """The records under results/, read once."""
    found, damaged = records.load_all(Path(__file__).parent.parent / "results")
    assert not damaged
    return found


@pytest.fixture(scope="session")
def cost_model(committed: list[records.Record]) -> CostModel:
    """Fitted to the records of a processor."""
    return CostModel.of(committed)
