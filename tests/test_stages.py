"""DVC runs a stage again if, and only if, something changed that it reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

PARAMS = yaml.safe_load(Path("params.yaml").read_text())
ROOT = Path(__file__).parents[1]  # the tests work in another folder
TRACKING = {f"tasks/{name}.py" for name in ("mlflow_store", "mlflow_views", "plot_style", "plots", "track")}
STAGES = {"model", "profile", "fit", "plan", "study", "report"}


def real_path(dep: str) -> str:
    """A dependency of dvc.yaml with the parameter it names."""
    return str(PARAMS[dep[2:-1]]) if dep.startswith("${") else dep


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """A pipeline like this one, with small files, all of whose stages are done."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(name, folder)
    for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values():
        outs = [next(iter(each)) if isinstance(each, dict) else each for each in stage.get("plots", [])]
        for name in map(real_path, [*stage.get("deps", []), *stage["outs"], *stage.get("metrics", []), *outs]):
            path = folder / name
            if Path(name).is_dir() or not Path(name).suffix:
                path = path / "content"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        repo = Repo.init(no_scm=True)
        repo.commit(force=True)
        yield repo
        repo.close()


def stale(repo: Repo) -> set[str]:
    return set(repo.status())


def paths(entries: list[str | dict[str, object]]) -> set[str]:
    return {real_path(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries}


@pytest.mark.parametrize("name", yaml.safe_load(Path("dvc.yaml").read_text())["stages"])
def test_what_a_stage_reads_is_in_the_checkout_or_is_written_by_a_stage(name: str) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    kinds = ("outs", "metrics", "plots")
    written = set().union(*(paths(stage.get(kind, [])) for stage in stages.values() for kind in kinds))
    assert {path for path in paths(stages[name]["deps"]) - written if not (ROOT / path).exists()} == set()


def test_nothing_is_stale_when_all_is_done(done: Repo) -> None:
    assert stale(done) == set()


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        (PARAMS["cluster"], {"model", "profile", "fit", "plan", "study", "report", "simulated"}),
        (PARAMS["scenario"], {"study", "report", "simulated"}),
        ("data/scenarios/another.yaml", {"simulated"}),
        ("data/models/another.yaml", {"report", "simulated"}),
        ("data/traces/content", {"study", "simulated"}),
        (PARAMS["prompts"], {"study"}),
        ("src/resplit/planner/content", {"plan", "study", "report", "simulated"}),
        ("src/resplit/cost/content", {"fit", "plan", "study", "report", "simulated"}),
        ("src/resplit/policies/new.py", {"study", "report", "simulated"}),
        ("src/resplit/simulate/run.py", {"study", "report", "simulated"}),
        ("src/resplit/node/content", {"profile", "study", "report", "simulated"}),
        ("src/resplit/shards/content", {"model", "study", "report", "simulated"}),
        ("tasks/report.py", {"study", "report"}),
        ("tasks/reality.py", {"study", "report"}),
        ("tasks/report_moves.py", {"study", "report"}),
        ("tasks/simulated_results.py", {"study", "report"}),
        ("tasks/study_records.py", {"study", "simulated"}),
        ("reports/simulated/metrics.json", {"simulated", "report"}),
        ("flows/stages.py", STAGES),
        ("flows/params.py", {"study", "simulated"}),
        ("flows/simulated.py", {"study", "simulated"}),
    ],
)
def test_a_touched_file_makes_the_stages_that_read_it_stale(done: Repo, path: str, stages: set[str]) -> None:
    file = Path(path)
    before = file.read_text() if file.exists() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("changed")
    try:
        assert stale(done) == stages
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert stale(done) == set()


@pytest.mark.usefixtures("done")
def test_another_cluster_of_params_is_what_the_stages_depend_on() -> None:
    text = Path("params.yaml").read_text()
    other = Path("data/clusters/other.yaml")
    other.write_text("other")
    Path("params.yaml").write_text(text.replace(PARAMS["cluster"], str(other)))
    with Repo() as again:
        found = again.status()
    assert set(found) == STAGES | {"simulated"}
    assert str(other) in str(found["plan"])


@pytest.mark.parametrize(
    ("stage", "file", "others"),
    [
        # How a run is started, tracked and logged does not change what it finds.
        (
            "simulated",
            "flows/simulated.py",
            {"flows/command.py", "flows/environment.py", "flows/orphans.py"} | TRACKING,
        ),
        # Of these only types are used.
        ("report", "tasks/report.py", {"tasks/expectations.py", "tasks/telemetry_rules.py", "tasks/validate.py"}),
    ],
)
def test_a_stage_depends_on_all_modules_that_it_imports(stage: str, file: str, others: set[str]) -> None:
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    missing = {name for name in imported(file) if not any(Path(name).is_relative_to(dep) for dep in deps)}
    assert missing == others


def imported(file: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The files of this checkout, the package aside, that a module imports, also through others."""
    found: set[str] = set()
    for line in (ROOT / file).read_text().splitlines():
        words = line.split()
        if words[:1] != ["from"] or words[1].split(".")[0] not in ("flows", "tasks"):
            continue
        names = [words[1], *(f"{words[1]}.{name.strip(',')}" for name in words[3:])]
        for module in {f"{name.replace('.', '/')}.py" for name in names} - {file, *seen}:
            if (ROOT / module).exists():
                found |= {module} | imported(module, seen | {file, module})
    return found
