"""A testbed on one machine with real links and processors: by hand, as root, on Linux.

Each node has its own network namespace and its own control group. `layout` computes addresses, quotas and shapes;
`network`, `relay` and `groups` make them; `machines` starts the ordinary commands in them; `home_day` and `disturbed`
are the experiments. docs/emulation.md compares the results with those of emulated hardware.
"""
