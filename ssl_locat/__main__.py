"""`python -m ssl_locat`: the same commands as `ssl-locat`."""

from ssl_locat.cli import main

if __name__ == "__main__":
    main()
