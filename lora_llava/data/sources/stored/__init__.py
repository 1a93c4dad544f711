"""Embedded images that stay in the file that holds them."""
