"""AntiBERTy as a backbone of mgen."""
