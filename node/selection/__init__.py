"""Selection of methods in the daemon: training, predictions, choices and votes, adoption trials."""
