"""Proven lower bounds: prices, cheapest paths, and branching."""
