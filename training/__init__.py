"""The recipe that trains the packaged model and the models of the studies; not in the wheel."""
