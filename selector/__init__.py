"""Pure decisions: history in, choice out. The clock and the random generator are arguments."""
