"""One node: its executor, its sessions' caches, its probe, and the service that others call."""
