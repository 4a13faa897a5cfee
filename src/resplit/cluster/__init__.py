"""A cluster on this machine or several: starting it, serving it, planning it for the first time, asking it."""
