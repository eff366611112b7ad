"""Columns in, one file out, and back."""
