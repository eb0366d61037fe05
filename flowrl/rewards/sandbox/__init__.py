"""Runs Python programs that nobody has read, shut off from the machine and from each other.

    reward worker (client.py)   knows the tests; compares; trusts nothing below but the zygote
      launcher, zygote (zygote.py)   a clean interpreter without tests or environment; forks
        program (confine.py, harness.py)   one process per run, confined before its first line

The zygote is forked for every run, so a run costs milliseconds and not a start of Python. Inputs
and outputs travel in memory files that the client makes and hands over; the zygote reads none of
them, so no fork of it holds anything of another run.

Two levels, see `confine.py`: "namespaces", where the kernel allows unprivileged user namespaces (or
the trainer is root), else "landlock". Below that nothing runs.

The modules are imported under two names: flowrl.rewards.sandbox here, and sandbox in the zygote,
which has no site-packages and must not import flowrl.rewards with all it needs. Hence the relative
imports, and nothing but the standard library in all but client.py.
"""
