"""Reads the tensors of a checkpoint one by one, and checks first that they are exactly those of the model.

A checkpoint is a folder of safetensors files, or tensors in memory. Nothing is read before it is wanted, so that
packaging a model needs the memory of its largest block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resplit.errors import ModelError

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
HOW_TO_CONVERT = (
    "a pickled file can run any code when it is read, so resplit reads safetensors only; convert the model where that "
    "does no harm: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Buffers that old checkpoints contain and that every implementation computes itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


class Checkpoint(Protocol):
    """Named tensors; `place` names the checkpoint in errors."""

    place: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        ...


class LoadedCheckpoint:
    """Tensors in memory."""

    def __init__(self, place: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.place = place
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]


class SafetensorsFolder:
    """A folder with `model.safetensors`, or with an index and the files that it names.

    ModelError if a file is missing or cannot be read, or if the index and the files disagree.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.place = str(folder)
        self._files: dict[str, Any] = {}  # the open file of each tensor
        named = _indexed_files(folder)
        for file in sorted(set(named.values())) or [_SINGLE]:
            _refuse_pickled(folder, file)
            try:
                opened: Any = safe_open(folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{folder / file} cannot be read: {error}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        if absent := sorted(named.keys() - self._files.keys()):
            raise ModelError(f"{folder / _INDEX} promises {_some(absent)}, which no file contains")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def locate(
    wanted: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, base: str, tied: Mapping[str, str]
) -> dict[str, str]:
    """The name in the checkpoint of each tensor that the model needs.

    `wanted` are the model's tensors and their shapes. A checkpoint of the base model alone lacks the prefix `base`.
    `tied` names, for a tensor that shares the weights of another one, that other one; its own copy is not read.

    ModelError names the tensors that are missing, that have another shape, or that no block needs.
    """
    shapes = checkpoint.shapes()
    names: dict[str, str] = {}
    for name in wanted:
        source = tied.get(name, name)
        names[name] = source if source in shapes else source.removeprefix(f"{base}.")
    missing = sorted({names[name] for name in wanted} - shapes.keys())
    if missing:
        raise ModelError(f"{checkpoint.place} lacks {_some(missing)}; fetch the checkpoint again")
    for name, shape in wanted.items():
        if shapes[names[name]] != shape:
            found = shapes[names[name]]
            raise ModelError(f"{checkpoint.place}: {names[name]} is {found}, config.json makes it {shape}")
    unused = sorted(shapes.keys() - set(names.values()) - tied.keys())
    if unused := [name for name in unused if not _COMPUTED.search(name)]:
        raise ModelError(f"{checkpoint.place} contains {_some(unused)}, which no block of this model uses")
    return names


def _refuse_pickled(folder: Path, file: str) -> None:
    """ModelError if weights would have to be read from a pickled file: reading one runs code that it contains."""
    pickled = [file] if file.endswith(_PICKLED) else []
    if not pickled and not (folder / file).exists():
        pickled = sorted(each.name for each in folder.iterdir() if each.suffix in _PICKLED)
    if pickled:
        raise ModelError(f"{folder} has its weights in {_some(pickled)}; {HOW_TO_CONVERT}")


def _indexed_files(folder: Path) -> dict[str, str]:
    """The file of each tensor, from the folder's index; empty without an index."""
    path = folder / _INDEX
    if not path.exists():
        return {}
    try:
        files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}") from None
    if missing := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise ModelError(f"{folder} lacks {_some(missing)}, which {_INDEX} names; fetch the checkpoint again")
    return files


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many follow."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
