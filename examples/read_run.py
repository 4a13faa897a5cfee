"""Read the record of a run and summarise it: `python examples/read_run.py data/generated/runs/NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

from resplit.metrics import downtime, epoch_latency, summarise
from resplit.records import RunRecord


def main() -> None:
    record = RunRecord.load(Path(sys.argv[1]))
    summary = summarise(record)
    print(f"policy {record.policy}, scenario {record.scenario}, {len(record.requests)} requests offered")
    for name, value in vars(summary).items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    print("\nevery epoch, predicted and measured:")
    print(epoch_latency(record).to_string(index=False))
    print(f"\n{len(downtime(record))} downtime incidents")


if __name__ == "__main__":
    main()
