"""Methods: one paper, one file. Preparers decide transforms and clips, solvers pick the codes of one weight."""
