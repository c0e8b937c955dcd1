"""Lets `python -m peftcli` and `torchrun -m peftcli` start the command line."""

from peftcli.cli.main import main

if __name__ == "__main__":
    main()
