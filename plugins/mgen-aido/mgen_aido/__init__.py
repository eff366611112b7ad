"""GenBio's DNA, RNA and protein models for mgen."""
