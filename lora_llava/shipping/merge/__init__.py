"""Merge an adapter into its base, tensor by tensor, and compare the result with base + adapter."""
