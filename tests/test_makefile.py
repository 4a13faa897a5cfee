"""The make targets work in a checkout whose path has spaces, and with an environment that has no pip."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def recipes(folder: Path, *arguments: str) -> str:
    """What make would run in a folder, whether or not make runs these tests."""
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, check=True).stdout


def test_no_path_of_a_target_is_split_at_a_space(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    python = tmp_path / "my python"
    python.symlink_to(sys.executable)

    found = recipes(checkout, f"PYTHON={python}", *targets)

    split = [
        word
        for line in found.replace("\\\n", " ").splitlines()
        for word in shlex.split(line, comments=True)
        if word.endswith((f"{tmp_path}/a", f"{tmp_path}/my")) or word in ("checkout", "python")
    ]
    assert split == []


def test_an_environment_without_pip_gets_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    (tmp_path / "pyproject.toml").touch()

    first = recipes(tmp_path, ".venv/torch").splitlines()[0]
    subprocess.run(["sh", "-c", first], cwd=tmp_path, check=True, env={**os.environ, "PIP_NO_INDEX": "1"})

    pip = subprocess.run([tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=False)
    assert pip.returncode == 0
