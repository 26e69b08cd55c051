"""Shared-memory log rings."""
