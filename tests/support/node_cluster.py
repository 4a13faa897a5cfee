"""Real nodes on the test's own event loop, as the chaos experiments have them too."""

from tests.support.in_process import InProcess, deploy, in_process, until

__all__ = ["InProcess", "deploy", "in_process", "until"]
