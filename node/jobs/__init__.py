"""Jobs: the coordinator that submits them and the stages that serve them."""
