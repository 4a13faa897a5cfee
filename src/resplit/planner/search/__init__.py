"""Placements by local search: annealing and steepest descent."""
