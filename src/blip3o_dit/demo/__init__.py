"""A local page to try a model on: pictures in, tokens, decoded pictures and neighbours out."""
