"""The findings of experiments, as values and as the table in reports/chaos.md."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from tests.support.streams import Streams


@dataclass(frozen=True)
class Finding:
    """One measurement. `met` says whether it reaches `aim`, and is None where there is no aim."""

    experiment: str
    what: str
    measured: str
    aim: str = ""
    met: bool | None = None


@dataclass
class ChaosReport:
    """All findings of one run. `load` is the machine's load average after each experiment, by name."""

    scale: float
    begun: str
    findings: list[Finding] = field(default_factory=list)
    took_s: dict[str, float] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, findings: list[Finding], took_s: float) -> None:
        """Add the findings of one experiment, and how long it ran."""
        self.findings += findings
        self.took_s[name] = round(took_s, 1)
        self.load[name] = round(psutil.getloadavg()[0], 2)

    def write(self, folder: Path) -> None:
        """Write chaos.md for people and chaos.json for programs."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chaos.json").write_text(json.dumps(asdict(self) | {"machine": machine()}, indent=1) + "\n")
        (folder / "chaos.md").write_text(self._table())

    def _table(self) -> str:
        versions = ", ".join(f"{key} {value}" for key, value in machine().items())
        lines = ["# Chaos", "", f"Begun {self.begun}, scale {self.scale:g}; {versions}.", ""]
        lines += ["| experiment | what | measured | aim | met |", "| --- | --- | --- | --- | --- |"]
        met = {True: "yes", False: "**no**", None: ""}
        lines += [f"| {f.experiment} | {f.what} | {f.measured} | {f.aim} | {met[f.met]} |" for f in self.findings]
        lines += ["", "| experiment | ran for | load average at its end |", "| --- | --- | --- |"]
        lines += [f"| {name} | {took_s:.0f} s | {self.load[name]} |" for name, took_s in self.took_s.items()]
        return "\n".join(lines) + "\n"


def stream_findings(experiment: str, streams: Streams) -> list[Finding]:
    """The two promises that every experiment checks: no request fails, no token changes."""
    number = streams.right + streams.wrong + len(streams.failed)
    failed = f"{len(streams.failed)} of {number}" + (f" ({streams.failed[0]})" if streams.failed else "")
    return [
        Finding(experiment, "streams that failed", failed, "0", met=not streams.failed and number > 0),
        Finding(experiment, "streams with a wrong token", f"{streams.wrong} of {number}", "0", met=streams.wrong == 0),
    ]


def machine() -> dict[str, str]:
    """Versions and hardware of this machine."""
    packages = ("torch", "transformers", "grpclib")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "kernel": platform.release(),
        "cores": str(psutil.cpu_count()),
    }


def spread(seconds: Sequence[float], unit: str = "ms") -> str:
    """Median, 95th percentile and maximum as text; `seconds` are converted to `unit`."""
    if not seconds:
        return "none"
    factor = {"ms": 1e3, "s": 1.0}[unit]
    values = [factor * quantile(seconds, share) for share in (0.5, 0.95, 1.0)]
    digits = 0 if unit == "ms" and max(values) >= 10 else 2
    p50, p95, most = (f"{value:.{digits}f}" for value in values)
    return f"p50 {p50}, p95 {p95}, max {most} {unit} (n {len(seconds)})"


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile, or NaN if there are no values."""
    return float(np.quantile(values, share)) if len(values) else math.nan
