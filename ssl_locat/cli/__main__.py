"""`python -m ssl_locat.cli`, as torchrun and submitit are given it: the same commands."""

from ssl_locat.cli.process import main

if __name__ == "__main__":
    main()
