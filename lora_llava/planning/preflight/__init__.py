"""Checks before anything heavy: what recipe, configs, data headers and machine tell, all problems at once."""
