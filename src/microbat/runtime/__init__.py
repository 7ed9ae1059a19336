"""Runtime: a folder becomes a model that runs. Needs no method and no calibration."""
