"""Tables and figures of the documents, made from bench/results alone."""
