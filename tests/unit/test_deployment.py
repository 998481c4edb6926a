"""The files in deploy/, as far as they can be checked without systemd and Docker: the program accepts what they say."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from node.cli import run
from node.telemetry.metrics import NodeMetrics
from tests.support.dashboards import queries_of

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("METASWARM_")]:
        monkeypatch.delenv(name)


def accepts(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *arguments: str) -> bool:
    """Return whether `metaswarm node` takes these arguments and variables."""
    for name, value in environment.items():
        if name.startswith("METASWARM_"):
            monkeypatch.setenv(name, value)
    assert arguments[0] == "node"
    return run(["config", "check", *arguments[1:]]) == 0


def test_unit_starts_a_node_that_the_program_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (DEPLOY / "systemd/metaswarm.service").read_text().splitlines()
    settings = [line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#")]
    environment = dict(value.split("=", 1) for name, value in settings if name == "Environment")
    (command,) = [shlex.split(value) for name, value in settings if name == "ExecStart"]
    file = tmp_path / "node.toml"
    file.write_text('serve = ["smollm2-135m-instruct"]\n')
    assert environment["METASWARM_CONFIG"] == "/etc/metaswarm/node.toml"
    assert command[0].endswith("/metaswarm")
    assert accepts(monkeypatch, environment | {"METASWARM_CONFIG": str(file)}, *command[1:])
    stop_s = int(dict(settings)["TimeoutStopSec"])
    assert stop_s > 30, "a node drains for up to 30 s"


def test_unit_is_not_restarted_after_wrong_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (DEPLOY / "systemd/metaswarm.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    file = tmp_path / "node.toml"
    file.write_text('memory = "lots"\n')
    monkeypatch.setenv("METASWARM_CONFIG", str(file))
    assert run(shlex.split(settings["ExecStart"])[1:]) == int(settings["RestartPreventExitStatus"])
    assert not settings.keys() & {"ExecStartPre", "ExecCondition"}, "systemd looks at the exit status of ExecStart only"


def test_compose_file_starts_three_nodes_that_cover_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    image = dict(re.findall(r"(METASWARM_[A-Z_]+)=(\S+)", dockerfile[dockerfile.index("ENV ") :]))
    (command,) = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    blocks = set()
    for service in document["services"].values():
        environment = image | service["environment"] | {"METASWARM_API_KEY": "sesame"}
        assert accepts(monkeypatch, environment, *json.loads(command))
        start, end = environment["METASWARM_SERVE"].split(":")[1].split("-")
        blocks |= set(range(int(start), int(end)))
        assert {volume.split(":")[0] for volume in service["volumes"]} <= document["volumes"].keys()
    assert blocks == set(range(30))
    data = [service["volumes"][0] for service in document["services"].values()]
    assert len(set(data)) == 3, "each node has a data directory of its own"


def test_image_is_built_from_files_that_exist() -> None:
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    pinned = re.search(r"TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert pinned
    assert f"TORCH_VERSION={pinned[1]}" in dockerfile


def test_recipe_installs_the_pinned_versions_as_the_makefile_does() -> None:
    recipe = re.findall(r"^sudo \S+/pip install (.*)$", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    pinned = re.search(r"TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert pinned
    assert recipe[0].startswith(f"torch=={pinned[1]} --index-url https://download.pytorch.org/whl/cpu")
    assert recipe[1:] == ["-c constraints.txt ."]


@pytest.mark.parametrize(
    "document", ["README.md", "docs/deployment.md", "deploy/docker/Dockerfile", ".ci/run", "Makefile"]
)
def test_what_fastecdsa_is_built_with_is_installed_or_named(document: str) -> None:
    assert {"gcc", "libc6-dev", "libgmp-dev"} <= set(re.findall(r"[\w-]+", (ROOT / document).read_text()))


@pytest.mark.parametrize(("compiler", "returncode"), [("false", 2), ("true", 0)])
def test_make_names_missing_packages_before_pip_runs(compiler: str, returncode: int, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, program in (("python", "exit 1"), ("pip", "touch pip-ran")):
        file = tmp_path / ".venv/bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{program}\n")
        file.chmod(0o755)
    command = ["make", "--no-print-directory", "-C", str(tmp_path), "install", f"CC={compiler}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "pip-ran").exists()) == (returncode, returncode == 0)
    said = done.stderr.splitlines()
    assert ("apt-get install gcc libc6-dev libgmp-dev" in said[0]) if returncode else said == []


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana/metaswarm.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len(queries_of(DEPLOY / "grafana/metaswarm.json")) > 40


def test_dashboard_leaves_out_models_that_only_strangers_announce() -> None:
    (query,) = [each for each in queries_of(DEPLOY / "grafana/metaswarm.json") if "uncovered_blocks" in each]
    assert 'model!="other"' in query


def test_table_of_metrics_has_their_labels() -> None:
    rows = re.findall(r"^\| (`metaswarm_.*?) \| (.*?) \|", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    documented = {}
    for names, labels in rows:
        for name in re.findall(r"`(?:metaswarm|…)_(\w+)`", names):
            documented[f"metaswarm_{name}".removesuffix("_total")] = (set(re.findall(r"`(\w+)`", labels)), names)
    for collector in NodeMetrics().registry._collector_to_names:
        name, labels = getattr(collector, "_name", None), set(getattr(collector, "_labelnames", ()))
        if name is None:
            continue  # of the process
        in_table, names = documented[name]
        is_alone = "," not in names
        assert labels == in_table if is_alone or "http" in name else labels <= in_table, name


def test_backup_has_the_files_that_the_unit_reads_and_may_read_them() -> None:
    text = (ROOT / "docs/deployment.md").read_text()
    section = text[text.index("## Backup") : text.index("## Upgrade")]
    commands = section[section.index("```console") :].split("```")[1].splitlines()[1:]
    unit = (DEPLOY / "systemd/metaswarm.service").read_text()
    assert "StateDirectoryMode=0700" in unit
    assert all(command.startswith("sudo ") for command in commands), "the state directory is the service's own"
    (secrets,) = re.findall(r"^EnvironmentFile=-(\S+)$", unit, re.MULTILINE)
    (configuration,) = re.findall(r"^Environment=METASWARM_CONFIG=(\S+)$", unit, re.MULTILINE)
    saved = " ".join(commands)
    assert all(file in saved or str(Path(file).parent) in saved for file in (secrets, configuration))
