"""Training loops over trainopt's optimizers."""
