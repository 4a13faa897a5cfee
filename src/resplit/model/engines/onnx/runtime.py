"""ONNX Runtime as this engine uses it: graphs from bytes, run on memory that the caller owns."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from onnxruntime.capi._pybind_state import SessionIOBinding

from resplit.errors import ModelError

Array = np.ndarray[Any, Any]
# A bound tensor: its name in the graph, the type of its items, its shape, and its address.
Bound = tuple[str, type[np.generic], tuple[int, ...], int]

_CPU = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
# One run of a graph on bound memory.
Call = Callable[[], None]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


def _return_freed_memory() -> None:
    """Have glibc give freed tensors back to the system at once; other C libraries have no such setting.

    Otherwise it keeps what large prompts needed: 700 MiB instead of 350 after one of 1000 tokens.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        library.mallopt(_M_TRIM_THRESHOLD, 256 * 1024)


def _share_arena() -> None:
    """Have all graphs take their intermediate results from one arena; one for each would hold more than the blocks."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    as_requested = onnxruntime.OrtArenaCfg(0, 1, -1, -1)
    onnxruntime.create_and_register_allocator(memory, as_requested)


def _choose_plain_attention() -> None:
    """Have attention compute all scores of a row at once, and not in tiles.

    For one position this is faster. And the bits of tiles would depend on the size of the processor's cache.
    """
    os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] = "1"  # read when a graph is loaded


class Graph:
    """One graph with its weights."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def call(self, inputs: Iterable[Bound], outputs: Iterable[Bound]) -> Call:
        """A call that runs the graph on this memory, any number of times."""
        binding = SessionIOBinding(self._session)
        for name, kind, shape, address in inputs:
            binding.bind_input(name, _CPU, kind, shape, address)
        for name, kind, shape, address in outputs:
            binding.bind_output(name, _CPU, kind, shape, address)
        return partial(self._session.run_with_iobinding, binding, None)


class Runtime:
    """Loads graphs. All graphs of the process share one pool of threads."""

    _threads: int | None = None  # of the process: the pool is made once
    _shared: ClassVar[dict[bytes, Any]] = {}  # sessions of graphs without weights, by digest: they stay, and are small
    _lock = threading.Lock()

    def __init__(self, threads: int) -> None:
        with Runtime._lock:
            if Runtime._threads is None:
                _return_freed_memory()
                _choose_plain_attention()
                onnxruntime.set_default_logger_severity(3)
                onnxruntime.set_global_thread_pool_sizes(threads, 1)
                _share_arena()
                Runtime._threads = threads
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._options.use_per_session_threads = False
        self._options.add_session_config_entry("session.use_env_allocators", "1")
        self._options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")

    def graph(self, model: Array) -> Graph:
        """A graph with its weights; ModelError if the bytes are no graph that this runtime can run."""
        return Graph(self._load(model.tobytes()))

    def shared_graph(self, model: Array) -> Graph:
        """A graph without weights: equal ones of the process share a session."""
        serialised = model.tobytes()
        digest = hashlib.sha256(serialised).digest()
        if digest not in Runtime._shared:
            Runtime._shared[digest] = self._load(serialised)
        return Graph(Runtime._shared[digest])

    def _load(self, serialised: bytes) -> Any:
        try:
            session = onnxruntime.InferenceSession(serialised, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises a class of its own for every kind of failure
            raise ModelError(f"ONNX Runtime cannot load a graph: {(str(error).splitlines() or [''])[0]}") from error
        return session._sess
