"""`python -m care_mla.cli`, which is what torchrun and accelerate launch start."""

from care_mla.cli import main

main()
