"""Readers and writers of tables: one module a format, listed in `plugin.py`."""
