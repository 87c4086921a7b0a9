"""`python -m tpn`."""

from tpn.cli import main

main()
