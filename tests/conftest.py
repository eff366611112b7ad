"""What all tests need of the process that they run in."""

import signal

# A background job of a shell ignores these, and so would every process that a test starts.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
