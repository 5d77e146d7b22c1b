"""Entry point of `headwater …` and `python -m headwater …`: SIGTERM and Ctrl-C end with 130 from here on, the imports included."""

import os
import signal


def _end(number: int, frame: object) -> None:
    os._exit(130)  # an exception could be caught by the package that is being imported


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _end)
    from headwater.cli.main import main as run

    for number in handled:
        signal.signal(number, _interrupt)
    run()


if __name__ == "__main__":
    main()
