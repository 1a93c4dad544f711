"""From nothing to a tuned model on a CPU."""
