"""The blocks of a model as sealed shards: packaging, the registry that stores them, and the keys that open them."""
