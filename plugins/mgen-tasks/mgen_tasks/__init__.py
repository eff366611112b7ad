"""The everyday tasks of mgen."""
