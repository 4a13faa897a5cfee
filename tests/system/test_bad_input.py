"""Errors in commands and cluster files: one line names the error and its place, and no process keeps running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from resplit.security.authority import keys_command
from tests.support.cluster import share_packaged_model
from tests.support.processes import run_resplit

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]

CLUSTER = """\
name: test
source: alone
trusted: [alone]
nodes:
  - {name: alone, memory: 4 MiB}
classes:
  - {name: chat, rate_rps: 0.5, prompt_tokens: 12, new_tokens: 40}
kv_tokens: 256
"""


def emulated(memory: str, decode: str) -> str:
    """The same cluster with an emulated node that takes `decode` for one token of any block."""
    times = [f"{{embed: {each}, layer: {each}, head: {each}}}" for each in (decode, "0.1 ms")]
    node = f"memory: {memory}, emulate: {{decode_per_token: {times[0]}, prefill_per_token: {times[1]}}}"
    links = "links: {default: {latency: 1 ms, bandwidth: 1 Gbit/s}}\n"
    return CLUSTER.replace("memory: 4 MiB", node).replace("classes:", links + "classes:")


def up(folder: Path, text: str, *more: str) -> subprocess.CompletedProcess[str]:
    """`resplit up` with a cluster file of this content."""
    (folder / "cluster.yaml").write_text(text)
    state = ["--state", str(folder / "state")]
    return run_resplit("up", str(folder / "cluster.yaml"), *state, "--port", "0", *more)


def running(folder: Path) -> list[list[str]]:
    """The command lines of processes whose arguments name this folder."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(str(folder) in argument for argument in line)]


def assert_refused(done: subprocess.CompletedProcess[str], folder: Path, *says: str) -> None:
    """One line on standard error that contains all of `says`, an exit status, no output, and no process left."""
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("resplit: ")
    for part in says:
        assert part in done.stderr
    assert running(folder) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kv_tokens", "kv_token", ":8: kv_token: unknown key; do you mean kv_tokens?"),
        ("trusted: [alone]", "trusted: [attic]", ":3: trusted: 'attic' is not in this cluster; it has alone"),
        ("nodes:", "nodes: [", ": is not YAML: "),
    ],
    ids=["unknown key", "unknown node", "no YAML"],
)
def test_a_cluster_file_with_an_error_starts_nothing(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert_refused(up(tmp_path, CLUSTER.replace(old, new)), tmp_path, "cluster.yaml", says)
    assert not (tmp_path / "state").exists()


def test_a_port_in_use_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = up(tmp_path, CLUSTER, "--port", port)
    assert_refused(done, tmp_path, f"--port {port}", "Address already in use", "choose another port")


def test_a_port_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert_refused(up(tmp_path, CLUSTER, "--port", "99999"), tmp_path, "--port 99999", "0-65535")
    done = run_resplit("serve", str(tmp_path / "cluster.yaml"), "--port", "99999")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "--port" in done.stderr


def test_where_a_member_cannot_listen_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "state").mkdir(mode=0o700)
    keys_command(tmp_path / "state" / "keys", ["alone"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        state = ["--state", str(tmp_path / "state")]
        serve = run_resplit("serve", str(tmp_path / "cluster.yaml"), *state, "--port", at.partition(":")[2])
        node = run_resplit("node", str(tmp_path / "cluster.yaml"), *state, "--name", "alone", "--listen", at)
    for done in (serve, node):
        assert_refused(done, tmp_path, f"resplit: {at}: cannot listen there: Address already in use")


@pytest.mark.parametrize("url", ["s4://bucket/shards", "github://"])
def test_a_registry_that_cannot_be_used_is_named(tmp_path: Path, url: str) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "state").mkdir(mode=0o700)
    keys_command(tmp_path / "state" / "keys", ["alone"])
    node = ["node", str(tmp_path / "cluster.yaml"), "--name", "alone", "--listen", "127.0.0.1:1"]
    done = run_resplit(*node, "--state", str(tmp_path / "state"), "--registry", url)
    assert_refused(done, tmp_path, f"registry {url}: cannot be used: ")


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    scenario = str(ROOT / "data" / "scenarios" / "home-day.yaml")
    done = run_resplit("simulate", scenario, "--policy", "oracle", "--rival", str(tmp_path / "file"))
    assert_refused(done, tmp_path, f"resplit: {tmp_path / 'file' / 'run.json'}: Not a directory")


def test_a_missing_folder_of_a_model_is_no_name_of_a_hub(tmp_path: Path) -> None:
    size = ["size", str(tmp_path / "absent"), "--users", "1", "--context", "64", "--state", str(tmp_path / "state")]
    assert_refused_last(run_resplit(*size), tmp_path, "absent' cannot be read: there is no such folder; give a local")


def test_an_interruption_is_no_error(tmp_path: Path) -> None:
    code = """
import sys, resplit.cli
def interrupted() -> None:
    raise KeyboardInterrupt
resplit.cli.log_to_stderr = interrupted
resplit.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_missing_cluster_file_and_an_unknown_node_are_named(tmp_path: Path) -> None:
    assert_refused(
        run_resplit("serve", str(tmp_path / "absent.yaml")), tmp_path, "absent.yaml: cannot be read: No such"
    )
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    done = run_resplit("node", str(tmp_path / "cluster.yaml"), "--name", "attic")
    assert_refused(done, tmp_path, "--name: 'attic' is not in", "it has alone")
    done = run_resplit("node", str(tmp_path / "cluster.yaml"), "--name", "alone", "--listen", "nowhere")
    assert_refused(done, tmp_path, "--listen 'nowhere': is not host:port")


def test_the_keys_of_another_member_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER.replace("memory: 4 MiB", "memory: 4 MiB, address: '127.0.0.1:7001'"))
    assert run_resplit("keys", str(tmp_path / "cluster.yaml"), "--state", str(tmp_path)).returncode == 0
    keys = ["--keys", str(tmp_path / "keys" / "controller")]
    done = run_resplit("node", str(tmp_path / "cluster.yaml"), "--name", "alone", *keys)
    assert_refused(done, tmp_path, "keys/controller: has the keys of 'controller', not of 'alone'", "copy the folder")


def test_a_gateway_that_others_can_reach_is_refused_before_the_model_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    serve = ["serve", str(tmp_path / "cluster.yaml"), "--state", str(tmp_path / "state"), "--host", "0.0.0.0"]
    done = run_resplit(*serve, "--model", str(tmp_path / "absent-model"))
    assert_refused_last(done, tmp_path, "--host 0.0.0.0", "it needs API keys")


def test_the_version_is_printed() -> None:
    done = run_resplit("--version")
    assert (done.returncode, done.stdout) == (0, f"resplit {version('resplit')}\n")


@pytest.mark.parametrize(("command", "package"), [("status", "httpx"), ("plan", "scipy"), ("serve", "fastapi")])
def test_a_command_that_a_nodes_installation_lacks_says_what_to_install(
    command: str, package: str, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    arguments = ["resplit", command, *([str(tmp_path / "cluster.yaml")] if command != "status" else [])]
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = {arguments}; from resplit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert_refused(done, tmp_path, f"the package {package} is missing", "pip install '.[serve]'")


def test_a_model_that_cannot_be_obtained_is_named_and_no_partial_copy_stays(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    keys_command(state / "keys", ["alone"])  # they are read first: nobody should fetch a model in vain
    serve = ["serve", str(tmp_path / "cluster.yaml"), "--state", str(state)]
    done = run_resplit(*serve, "--model", str(tmp_path / "absent-model"), env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert_refused_last(done, tmp_path, "absent-model' cannot be read", "give a local folder")
    assert list((state / "models").iterdir()) == []


def assert_refused_last(done: subprocess.CompletedProcess[str], folder: Path, *says: str) -> None:
    """Like `assert_refused`, but log lines of a member that starts come first."""
    *log, last = done.stderr.splitlines(keepends=True)
    assert all("[info" in line for line in log), done.stderr
    assert_refused(subprocess.CompletedProcess(done.args, done.returncode, done.stdout, last), folder, *says)


def test_a_model_that_fits_nowhere_is_refused_with_the_reason(tmp_path: Path, model_folder: Path) -> None:
    share_packaged_model(tmp_path / "state", model_folder)
    done = up(tmp_path, emulated("900 KiB", "10 ms"), "--model", str(model_folder))
    assert_refused_last(done, tmp_path, "no placement", "memory")


def test_hardware_that_this_machine_cannot_emulate_is_refused(tmp_path: Path, model_folder: Path) -> None:
    share_packaged_model(tmp_path / "state", model_folder)
    done = up(tmp_path, emulated("4 MiB", "1 us"), "--model", str(model_folder))
    assert_refused_last(done, tmp_path, "nodes.alone.emulate", "as declared", "truly needs")


def test_a_cluster_that_is_stopped_while_it_starts_leaves_no_process(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    command = [sys.executable, "-m", "resplit.cli", "up", str(tmp_path / "cluster.yaml")]
    command += ["--state", str(tmp_path / "state"), "--port", "0", "--model", str(model_folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as starting:
        until_s = time.monotonic() + 60
        while len(running(tmp_path)) < 3 and time.monotonic() < until_s:
            time.sleep(0.05)
        assert len(running(tmp_path)) == 3  # `up` itself, the node, and gateway with controller
        starting.send_signal(signal.SIGTERM)
        assert starting.wait(20) != 0
    assert running(tmp_path) == []


def test_help_imports_no_heavy_package() -> None:
    heavy = "{'torch', 'cvxpy', 'transformers', 'pandas', 'mlflow', 'scipy', 'highspy', 'fastapi'}"
    check = f"import sys, resplit.cli; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = run_resplit("--help")
    assert shown.returncode == 0
    for command in (
        "up",
        "node",
        "serve",
        "status",
        "drain",
        "join",
        "trust",
        "apply",
        "plan",
        "keys",
        "doctor",
        "size",
    ):
        assert f" {command} " in shown.stdout
