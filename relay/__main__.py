"""`python -m relay supervisor …` is mcrd, `python -m relay control …` is mcrctl."""

import click

from relay.cli import mcrctl, mcrd

if __name__ == "__main__":
    click.Group("relay", commands={"supervisor": mcrd.main, "control": mcrctl.main})()
