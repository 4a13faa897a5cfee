"""The systemd units of docs/operations.md: systemd accepts every line, and `resplit` accepts every option."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from resplit.cli import app

OPERATIONS = Path(__file__).parents[1] / "docs/operations.md"
PROGRAM = "/opt/resplit/.venv/bin/resplit"
UNITS = dict(
    re.findall(
        r"^`/etc/systemd/system/(\S+)`.*?^```ini\n(.*?)^```", OPERATIONS.read_text(), flags=re.DOTALL | re.MULTILINE
    )
)
STARTED = ["resplit-node@shed.service", "resplit-serve.service"]


@pytest.fixture
def unit_folder(tmp_path: Path) -> Path:
    """The units as files. They start a program that is on every machine."""
    for name, text in UNITS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(PROGRAM, "/bin/true"))
    return tmp_path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", STARTED)
def test_systemd_accepts_the_units_and_rates_them_as_confined(unit_folder: Path, unit: str) -> None:
    assert _analyze(unit_folder, "verify", "--man=no", unit) == ""
    rated = _analyze(unit_folder, "security", "--offline=yes", "--threshold=25", unit)
    assert "Overall exposure level" in rated


@pytest.mark.parametrize("unit", [name for name in UNITS if name.endswith(".service")])
def test_the_options_of_a_unit_are_those_of_the_command(unit: str) -> None:
    joined = UNITS[unit].replace("\\\n", " ")  # a backslash continues a line
    (line,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", joined, flags=re.MULTILINE)
    command, *arguments = shlex.split(line)
    parser = get_command(app).commands[command]
    parsed = parser.make_context(command, arguments, resilient_parsing=False)
    assert parsed.params["cluster"] == Path("/etc/resplit/cluster.yaml")


def _analyze(folder: Path, *arguments: str) -> str:
    """What `systemd-analyze` prints on units of this folder; it fails on a unit that is rated too low."""
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout
