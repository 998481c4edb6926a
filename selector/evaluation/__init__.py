"""Research: what the meta-model is compared with, and how. The daemon uses none of it."""
