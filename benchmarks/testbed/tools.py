"""The commands of the system that the testbed needs, and how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from resplit.errors import ConfigError, ResplitError

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux"}


def missing() -> str:
    """Why the testbed cannot run here, in words; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces and control groups"
    absent = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool) is None})
    if absent:
        return f"needs tools that are not here: apt-get install {' '.join(absent)}"
    if not Path("/dev/net/tun").exists():
        return "needs TUN devices, and /dev/net/tun is not here"
    if not Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists() and not _version_2():
        return "needs the controller cpu of control groups, which is not mounted in /sys/fs/cgroup"
    return ""


def _version_2() -> bool:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    return controllers.exists() and "cpu" in controllers.read_text().split()


def require() -> None:
    """ConfigError if the testbed cannot run here."""
    if why := missing():
        raise ConfigError("the testbed", why)


def call(*command: str, check: bool = True, text: str | None = None) -> str:
    """Run a command; returns what it prints. ResplitError with its complaint if it fails and `check` is set."""
    done = subprocess.run(command, capture_output=True, text=True, input=text, check=False)
    if check and done.returncode:
        raise ResplitError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def within(namespace: str, command: Sequence[str]) -> list[str]:
    """The command, in a network namespace. Unlike `ip netns exec` it keeps /sys, where nodes read their quotas."""
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]
