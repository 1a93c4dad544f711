"""From an artifact or a model to a repository on the Hugging Face Hub: what goes up, its card, and the way there."""
