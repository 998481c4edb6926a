"""Research: baselines, folds and measures for the meta-model. The daemon uses none of it."""
