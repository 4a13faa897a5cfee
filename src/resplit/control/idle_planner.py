"""Plans in a process of its own, at low priority, so that planning ahead does not delay the tokens of this process.

The process reads a problem from each line of its standard input, and answers with a line. It ends with its parent,
because its input then closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass

import structlog
from pydantic import TypeAdapter

from resplit.control.ready_plans import plan_ahead
from resplit.problem import problem_from_json, problem_to_json
from resplit.process.logs import log_to_stderr
from resplit.types import Problem

_log = structlog.get_logger(__name__)
_NICENESS = 5
_TIME_LIMIT_S = 0.3
_ANSWER_WITHIN_S = 60.0  # its start included, which compiles the planner's kernels where that was never done
_LONGEST_LINE = 2**24


@dataclass(frozen=True)
class _Answer:
    """A placement, if there is one, and what the plan took."""

    placement: tuple[str, ...] | None
    processor_s: float


_ANSWER = TypeAdapter(_Answer)


class IdlePlanner:
    """The process, started when it is needed. One plan at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self.processor_s = 0.0  # so far, of all its processes

    async def plan(self, problem: Problem) -> tuple[str, ...] | None:
        """The best placement; None if there is none, or if the process ended."""
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                answer = await self._ask(problem)
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            _log.warning("planning ahead failed", error=str(error) or type(error).__name__)
            await self.stop()
            return None
        self.processor_s += answer.processor_s
        return answer.placement

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, problem: Problem) -> _Answer:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
            )
        writer, reader = self._process.stdin, self._process.stdout
        assert writer is not None
        assert reader is not None
        writer.write(json.dumps(problem_to_json(problem)).encode() + b"\n")
        await writer.drain()
        return _ANSWER.validate_json(await reader.readuntil())


def answer(line: str) -> str:
    """The plan for the problem in a line, as a line: its placement or null, and the seconds of processor time."""
    begun_s = sum(os.times()[:2])
    placement = plan_ahead(problem_from_json(json.loads(line)), _TIME_LIMIT_S)
    return _ANSWER.dump_json(_Answer(placement, sum(os.times()[:2]) - begun_s)).decode()


def main() -> None:
    """Answer lines until the input closes."""
    log_to_stderr()  # standard output is for answers
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    for line in sys.stdin:
        sys.stdout.write(answer(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
