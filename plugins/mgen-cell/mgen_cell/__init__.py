"""Single-cell models and files for mgen."""
