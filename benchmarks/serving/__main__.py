"""`python -m benchmarks.serving`: measures serving on this machine, prints a table and writes reports/bench.json.

Every node, the engine alone, transformers and llama.cpp compute with one thread. All figures are medians of several
repeats of one run, and most are ratios: machines differ. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.serving import llama_cpp
from benchmarks.serving.clusters import Cost, Setup, restart_s, serving
from benchmarks.serving.hops import hop_figures
from benchmarks.serving.installation import node_install_bytes
from benchmarks.serving.live_page import live_page_figures
from benchmarks.serving.load import decode_rate, first_token_s, longest_gap_ratio, prefill_rate
from benchmarks.serving.speculation import speculation_figures
from resplit.cluster.local import Cluster
from resplit.config import LimitsConfig

Figures = dict[str, float | str | None]  # by name; None where llama.cpp was not built


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement")
    parser.add_argument("--cache", type=Path, default=Path(".resplit/bench"), help="packaged models and llama.cpp")
    parser.add_argument("--out", type=Path, default=Path("reports/bench.json"), help="where the figures go")
    parser.add_argument("--build-llama-cpp", action="store_true", help="build llama.cpp first (ten minutes)")
    options = parser.parse_args()
    models, llama = options.cache / "models", options.cache / "llama.cpp"
    models.mkdir(parents=True, exist_ok=True)
    if options.build_llama_cpp and not llama_cpp.is_built(llama):
        if missing := llama_cpp.missing_tools():
            sys.exit(f"llama.cpp cannot be built: this machine lacks {', '.join(missing)}")
        llama_cpp.build(llama)
    figures = measure(models, llama if llama_cpp.is_built(llama) else None, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:32} {value:.3g}" if isinstance(value, float) else f"{name:32} {value}")


def measure(models: Path, llama: Path | None, repeats: int) -> Figures:
    """All figures. Those of llama.cpp are None where it was not built."""
    alone = {width: _alone(width, models, repeats) for width in ("float32", "int4")}
    generate = _alone("generate", models, repeats)["generate"]
    one32 = _serve(Setup(1, "float32"), models, repeats, _decode)
    # llama.cpp runs next to what it is compared with, because the pace of a shared machine drifts.
    one4 = _serve(Setup(1, "int4"), models, repeats, _one_node)
    peer = llama_cpp.rates(llama, repeats) if llama else None
    two4 = _serve(Setup(2, "int4"), models, repeats, _decode)
    remote = llama_cpp.rates(llama, repeats, servers=2) if llama else None
    copied = _serve(Setup(2, "int4", copy_every=LimitsConfig().copy_every), models, repeats, _decode)
    figures: Figures = {
        **hop_figures(models, repeats),
        **speculation_figures(models, repeats),
        "one_node_vs_generate": one32["decode_1"] / generate,
        "two_nodes_vs_one": two4["decode_1"] / one4["decode_1"],
        "batch8_vs_1": one32["decode_8"] / one32["decode_1"],
        "batch8_vs_1_4bit": one4["decode_8"] / one4["decode_1"],
        "batch8_vs_engine_alone": one4["decode_8"] / alone["int4"]["decode_8"],
        "batch8_vs_engine_alone_fp32": one32["decode_8"] / alone["float32"]["decode_8"],
        "copy_cost": 1 - copied["decode_8"] / two4["decode_8"],
        "ttft_under_load_ratio": one4["ttft_8"] / one4["ttft_0"],
        "longest_gap_ratio": one4["longest_gap_ratio"],
        "gateway_cpu_ms_per_token": one4["gateway_cpu_ms_per_token"],
        "path_cpu_ms_per_token": one4["cpu_ms_per_token"] - alone["int4"]["compute_ms_per_token"],
        **{name: value for name, value in one4.items() if name.startswith("live_page")},
        "node_start_s": one4["node_start_s"],
        "node_bytes": one4["node_bytes"],
        "node_overhead_bytes": one4["node_overhead_bytes"],
        "node_install_bytes": node_install_bytes(),
        "decode_4bit_vs_llama_cpp": None,
        "prefill_4bit_vs_llama_cpp": None,
        "two_nodes_4bit_vs_llama_cpp_rpc": None,
    }
    if peer and remote:
        figures |= {
            "decode_4bit_vs_llama_cpp": one4["decode_1"] / peer["decode"],
            "prefill_4bit_vs_llama_cpp": one4["prefill"] / peer["prefill"],
            "two_nodes_4bit_vs_llama_cpp_rpc": two4["decode_1"] / remote["decode"],
            "llama_cpp_decode": peer["decode"],
            "llama_cpp_prefill": peer["prefill"],
            "llama_cpp_rpc_decode": remote["decode"],
        }
    rates = {"float32": one32, "int4": one4, "two_nodes_int4": two4}
    figures |= {
        f"{name}_{key}": value for name, found in rates.items() for key, value in found.items() if "code_" in key
    }
    figures |= {f"engine_{width}_{key}": value for width, found in alone.items() for key, value in found.items()}
    return figures | {"generate": generate, "machine": _machine(), "versions": _versions()}


def _serve(
    setup: Setup, models: Path, repeats: int, measured: Callable[[Cluster, int], dict[str, float]]
) -> dict[str, float]:
    print(f"{setup.nodes} node(s), {setup.weights}, copies every {setup.copy_every} tokens", file=sys.stderr)
    with serving(setup, models) as cluster:
        decode_rate(cluster.url, 1, new_tokens=16)  # the first passes of a process are slower
        return measured(cluster, repeats)


def _decode(cluster: Cluster, repeats: int) -> dict[str, float]:
    """Decode rates of 1 and of 8 streams."""
    return {f"decode_{n}": _median(repeats, partial(decode_rate, cluster.url, n)) for n in (1, 8)}


def _one_node(cluster: Cluster, repeats: int) -> dict[str, float]:
    """What is measured on one node only, beside the decode rates."""
    found = _decode(cluster, repeats)
    found["prefill"] = _median(repeats, lambda: prefill_rate(cluster.url))
    found |= {f"ttft_{n}": _median(repeats, partial(first_token_s, cluster.url, n)) for n in (0, 8)}
    found["longest_gap_ratio"] = _median(repeats, lambda: longest_gap_ratio(cluster.url))
    costs = [_cost_per_token(cluster) for _ in range(repeats)]
    found |= {name: statistics.median(cost[name] for cost in costs) for name in costs[0]}
    held = Cost.of(cluster)
    found |= {"node_bytes": held.node_bytes, "node_overhead_bytes": held.node_overhead_bytes}
    found |= live_page_figures(cluster, repeats)
    found["node_start_s"] = restart_s(cluster, "node-0")
    return found


def _cost_per_token(cluster: Cluster, tokens: int = 256) -> dict[str, float]:
    """Processor time per token of one stream, of the gateway's process and of all processes."""
    before = Cost.of(cluster)
    decode_rate(cluster.url, 1, prompt_tokens=8, new_tokens=tokens)
    after = Cost.of(cluster)
    gateway_s, nodes_s = after.gateway_s - before.gateway_s, after.nodes_s - before.nodes_s
    return {
        "gateway_cpu_ms_per_token": gateway_s / tokens * 1e3,
        "cpu_ms_per_token": (gateway_s + nodes_s) / tokens * 1e3,
    }


def _alone(what: str, models: Path, repeats: int) -> dict[str, float]:
    """Rates of the engine or of transformers, in a process of their own."""
    print(f"{what}, alone", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.serving.alone", what, str(models), str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _median(repeats: int, measure_once: Callable[[], float]) -> float:
    return statistics.median(measure_once() for _ in range(repeats))


def _machine() -> str:
    names = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in names.splitlines() if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "torch", "transformers"))


if __name__ == "__main__":
    main()
