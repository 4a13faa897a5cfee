"""A node: hosts blocks, runs passes, keeps caches, measures itself, and serves the other members."""
