"""Scripts of maintainers."""
