"""The torch engine: any supported Hugging Face decoder, and the oracle of the others."""
