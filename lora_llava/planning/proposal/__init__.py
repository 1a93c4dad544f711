"""Propose a recipe for data that nobody has described yet: `look.look_at` and `text.recipe_text`."""
