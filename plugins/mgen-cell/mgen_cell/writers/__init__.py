"""Files of what was computed for cells."""
