"""Plain functions on documents and tokens: read, tokenise, cut into segments, store. No Ray here."""
