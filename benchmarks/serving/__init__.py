"""How fast clusters of real processes serve, beside the engine alone, transformers and llama.cpp."""
