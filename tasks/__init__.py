"""The tasks: each touches the world once, around plain logic. Flows order them; `resplit` does not know them."""
