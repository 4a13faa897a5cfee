"""The engines: siblings behind the interface of `base`. Each is imported only where it runs."""

from __future__ import annotations

from typing import Any

from resplit.model.engines.base import Engine
from resplit.model.spec import ModelSpec
from resplit.types import EngineChoice


def preload(choice: EngineChoice) -> None:
    """Import an engine's library: later the import would keep the event loop from answering for a second or more."""
    if choice == "torch":
        import resplit.model.engines.torch.engine
    else:
        import resplit.model.engines.onnx.engine  # noqa: F401


def open_engine(spec: ModelSpec, threads: int = 1) -> Engine[Any]:
    """An engine for the blocks of this model, without any block yet.

    `threads` holds for all engines of the process; the first one sets it.
    """
    if spec.engine == "onnx":
        from resplit.model.engines.onnx.engine import OnnxEngine

        return OnnxEngine(spec, threads)
    from resplit.model.engines.torch.engine import TorchEngine

    return TorchEngine(spec, threads)
