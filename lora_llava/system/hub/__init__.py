"""The Hugging Face Hub: reached within bounds, its failures in words, and models downloaded from it."""
