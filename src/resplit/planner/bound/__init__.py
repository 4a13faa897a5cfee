"""Proven lower bounds: column generation, pricing by shortest paths, and branch and bound."""
