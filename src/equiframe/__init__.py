"""Equiframe."""
