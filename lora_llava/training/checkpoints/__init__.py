"""Write, read and resume checkpoints."""
