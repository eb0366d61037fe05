"""`python -m flowrl`, and so `torchrun -m flowrl`."""

from flowrl.cli import main

main()
