"""Engines that run a folder on tokens, for `microbat verify`: one file each, found because it is there."""
