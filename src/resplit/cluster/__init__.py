"""A running cluster: its processes on this machine, gateway and controller, the first plan, and a client."""
