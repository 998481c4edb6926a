"""Research: compares selectors over files of measurements. The daemon uses none of it."""
