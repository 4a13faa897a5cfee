"""DVC runs a stage again if, and only if, something changed that it reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

PARAMS = yaml.safe_load(Path("params.yaml").read_text())
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


def test_nothing_is_stale_when_all_is_done(done: Repo) -> None:
    assert stale(done) == set()


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        (PARAMS["cluster"], {"model", "profile", "fit", "plan", "study", "simulated"}),
        (PARAMS["scenario"], {"study", "simulated"}),
        (PARAMS["prompts"], {"study"}),
        ("src/resplit/planner/content", {"plan", "study", "simulated"}),
        ("src/resplit/cost/content", {"fit", "plan", "study", "simulated"}),
        ("src/resplit/policies/new.py", {"study", "simulated"}),
        ("src/resplit/node/content", {"profile", "study", "simulated"}),
        ("src/resplit/shards/content", {"model", "study", "simulated"}),
        ("tasks/report.py", {"study", "report"}),
        ("tasks/simulated_results.py", {"study", "report"}),
        ("reports/simulated/metrics.json", {"simulated", "report"}),
        ("flows/stages.py", STAGES),
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
