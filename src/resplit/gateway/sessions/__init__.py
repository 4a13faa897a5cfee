"""Sessions over the nodes: admission, passes, moves to new epochs, and recovery after a loss."""
