"""`import resplit` offers the public names of the library, and loads none of them before its first use."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import resplit


@pytest.mark.parametrize("name", resplit.__all__)
def test_every_public_name_resolves(name: str) -> None:
    importlib.import_module(resplit._MODULE_OF[name])
    assert not isinstance(getattr(resplit, name), ModuleType)  # a submodule of the same name would hide it
    assert name in dir(resplit)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'resplit_all'"):
        _ = resplit.resplit_all


def test_a_node_on_onnx_runtime_imports_nothing_that_only_others_install() -> None:
    others = ("torch", "transformers", "onnx", "pandas", "scipy", "fastapi", "cvxpy")
    modules = "resplit.node.server, resplit.model.engines.onnx.engine"
    code = f"import sys, {modules}; print([name for name in {others} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize("module", ["resplit", "resplit.cli"])
def test_importing_it_loads_no_heavy_library(module: str) -> None:
    heavy = ("numpy", "pandas", "torch", "pydantic", "highspy")
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
