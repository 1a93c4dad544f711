"""The base model, what each stage trains of it, and the packed forward pass."""
