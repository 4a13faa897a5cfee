"""What every process of resplit shares: the event loop, the end of its tasks, garbage collection, log lines."""
