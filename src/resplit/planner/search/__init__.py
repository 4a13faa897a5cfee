"""Finds placements by local search: simulated annealing and steepest descent."""
