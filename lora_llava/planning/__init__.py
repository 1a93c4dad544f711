"""What is decided before a weight is read: memory, speed, attention kernel, preflight."""
