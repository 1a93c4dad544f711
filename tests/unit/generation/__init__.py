"""Unit tests of generation."""
