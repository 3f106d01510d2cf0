"""The optimizer step as one op: parallel gradient off the unit rows, clipping by the global norm, Adam, unit rows again."""
