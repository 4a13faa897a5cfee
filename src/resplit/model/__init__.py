"""Models as chains of blocks: where they come from, how they are packaged, and the engines that compute them."""

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # comes from the package index, see `resplit.model.source`
