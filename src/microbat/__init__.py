"""microbat."""
