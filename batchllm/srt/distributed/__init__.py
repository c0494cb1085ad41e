"""Ranks of an engine."""
