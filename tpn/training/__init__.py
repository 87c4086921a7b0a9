"""Training and evaluation: `tpn.train`, `tpn.evaluate`, and what they consist of."""
