"""How MLflow shows an experiment: its note, and the saved view of its cells."""

import base64
import json
import zlib

VIEW = "cells"  # the saved view of an experiment
_COLUMNS = ("rank", "seed", "variant")
# The results of a cell, by their short names, from the keys of its record. All else of a record is in record.json.
RESULTS = {
    "joint_nll": ("likelihood", "joint_nll", "mean"),
    "first_token_nll": ("likelihood", "first_token_nll", "mean"),
    "greedy_tokens": ("decoding", "modes", "greedy", "tokens_per_pass", "mean"),
    "sampled_tokens": ("decoding", "modes", "sampling", "tokens_per_pass", "mean"),
    "greedy_speedup": ("decoding", "modes", "greedy", "speedup", "median"),
    "sampled_speedup": ("decoding", "modes", "sampling", "speedup", "median"),
}
# What MLflow's table calls its own columns.
_OWN = {"1": 60, "attributes.`Run Name`": 220, "runDateAndNestInfo": 130, "duration": 90}


def address(server: str, experiment_id: str) -> str:
    """Of the view of an experiment's cells, on MLflow's side for training: its other side is about prompts."""
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def experiment_tags(experiment: str) -> dict[str, str]:
    """Of a new experiment: the view of its cells, and for a claim its question and the rule of its verdict.

    The kind says that it trains models; MLflow 3 opens on pages about prompts otherwise.
    """
    from experiments.claims import CLAIMS

    tags = {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": _view()}
    claim = next((claim for claim in CLAIMS if experiment.endswith(f" {claim.id}")), None)
    if claim is not None:
        tags["mlflow.note.content"] = f"{claim.question} {claim.statistic}; {claim.rule}"
    return tags


def _view() -> str:
    """The saved view of an experiment's cells: a table of settings and results, and each result against the rank.

    It is what the Views menu of MLflow 3.17 writes. Other versions leave out what they do not know.
    """
    charts = [
        {
            "uuid": f"chart-{index}",
            "type": "SCATTER",
            "deleted": False,
            "isGenerated": False,
            "runsCountToCompare": 100,
            "metricSectionId": "claims",
            "xaxis": {"key": "rank", "type": "PARAM"},
            "yaxis": {"key": key, "type": "METRIC"},
        }
        for index, key in enumerate(RESULTS)
    ]
    tags, results = [f"tags.`{key}`" for key in _COLUMNS], [f"metrics.`{key}`" for key in RESULTS]
    widths = _OWN | dict.fromkeys(tags[:2], 65) | dict.fromkeys(tags[2:], 110) | dict.fromkeys(results, 130)
    state = {
        "searchFilter": "tags.rank LIKE '%'",
        "orderByKey": "tags.`rank`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*tags, *results],
        "columnOrder": [*list(_OWN)[:2], *tags, *results, *list(_OWN)[2:]],
        "columnWidths": widths,
        "runsHiddenMode": "SHOWALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": "claims", "name": "Results against the rank", "display": True, "isReordered": True}
        ],
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
