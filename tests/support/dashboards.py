"""What a Grafana dashboard queries."""

import json
import re
from pathlib import Path

_METRIC = re.compile(r"\b(?:metaswarm|process)_[a-z_]+\b")


def queries_of(path: Path) -> list[str]:
    """Return the expressions of all panels and variables."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [each["query"]["query"] for each in dashboard["templating"]["list"] if isinstance(each["query"], dict)]
    return panels + variables


def metrics_in(queries: list[str]) -> set[str]:
    """Return the names of the metrics in expressions."""
    return {name for query in queries for name in _METRIC.findall(query)}
