"""`python -m lemo_fx`, and so `torchrun -m lemo_fx train ...`: the command `lemo-fx`."""

from lemo_fx.cli.app import app

if __name__ == "__main__":
    app(prog_name="lemo-fx")
