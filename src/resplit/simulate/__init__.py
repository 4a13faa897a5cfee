"""A simulator of clusters: discrete events, with the cost, planner, estimate and policy code of a real cluster.

Clocks and random sources are handed in. The same seed gives the same run.
"""
