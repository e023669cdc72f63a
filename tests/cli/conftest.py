"""Fixtures of the command line's tests."""

import sys

import pytest

from rsrouter.cli import main


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line in this process: (exit status, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rsrouter", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
