"""Published planners for comparison, each implemented from the description in its paper."""
