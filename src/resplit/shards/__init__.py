"""A model's blocks as sealed shards: packaging, the registry they lie in, and the keys that open them."""
