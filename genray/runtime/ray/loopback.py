"""Keeps a private Ray off the network. Has to run before `ray` is imported, so it must not import it."""

import os


def keep_on_loopback():
    """Makes a Ray that this process starts use 127.0.0.1, and listen nowhere else.

    By default Ray's servers listen on all interfaces. They bind to loopback alone if the node's address is
    loopback, and this is Ray's own switch for that (ray issue 18730; the name is historical). Joining a cluster
    needs it off, so only a command that starts a private Ray calls this.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
