"""The engine's library tells nobody what runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_onnx_engine_leaves_no_trace_of_its_makers_telemetry(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = "import resplit.model.engines.onnx.engine"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
