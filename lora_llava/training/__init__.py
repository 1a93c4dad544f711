"""A run: the stages of a recipe, one after the other, each ending in an artifact."""
