"""Planners that others have published, each written from its paper's description, for comparison."""
