"""Order, schedule and retries of the pipeline; what is done stands in `tasks` and `resplit`.

Importing this package quietens the tools below and keeps what they write inside the state folder.
"""

import os
from pathlib import Path

STATE = Path(os.environ.get("RESPLIT_STATE", ".resplit")).resolve()

_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_HOME": str(STATE / "prefect"),
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    # What fails is raised, and said once by whoever called the flow; Prefect would add a traceback for each level.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    # On one machine the flows share the cores with the nodes: one thread each is what they get.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Prefect makes its own folder, but not the one above it.
STATE.mkdir(parents=True, exist_ok=True)
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
