"""`python -m rsrouter`."""

from rsrouter.cli import main

if __name__ == "__main__":
    main()
