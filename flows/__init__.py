"""The flows: order, schedule and retries of the tasks."""

import os
from pathlib import Path

STATE = Path(os.environ.get("RESPLIT_STATE", ".resplit")).resolve()
