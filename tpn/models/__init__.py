"""Networks and blocks: plain nn.Modules on torch alone."""
