"""Every figure that trainopt's README quotes, with the command that makes it."""
