"""Compare an answer with its references."""
