"""Training in several processes: what they exchange in a step."""
