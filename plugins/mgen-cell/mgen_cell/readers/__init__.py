"""Files of counts, read a few cells at a time."""
