"""Who the members of a cluster are, and how their commands are signed and checked."""
