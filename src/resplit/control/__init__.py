"""The control plane: keys, signed commands and the durable log of epochs."""
