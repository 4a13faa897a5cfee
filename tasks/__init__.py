"""The tasks: each reads from or writes to the outside once, around a pure function. Flows call them in order."""
